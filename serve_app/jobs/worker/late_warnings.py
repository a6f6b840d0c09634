"""Warnings that a job has only once it is done (pure)."""

from __future__ import annotations

from collections.abc import Sequence

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.events import Done
from serve_app.jobs.job import Job

MERGED_UNPROVEN = "merged_unproven"  # the warning's code


def warnings_of(done: Done) -> tuple[Adjustment, ...]:
    """The warnings of a request that ended so."""
    exactness = (merged_unproven(done.merged_unproven),) if done.merged_unproven else ()
    return (*exactness, *done.warnings)


def merged_unproven(modules: Sequence[str]) -> Adjustment:
    """The warning of a result that may depend on other requests. modules: see events.Done."""
    return Adjustment(
        MERGED_UNPROVEN,
        "exact",
        f"{', '.join(modules)} ran for several requests at once in a batch size that is not proven to change "
        "no bit here, so the result may differ slightly from that of the request alone; "
        "exact: strict excludes that",
        of_result=True,
    )


def late_warnings(job: Job) -> tuple[Adjustment, ...]:
    """Those of a completed job; they are about its files, so a copy of the files has them too."""
    return tuple(warning for warning in job.warnings if warning.of_result or warning.code == MERGED_UNPROVEN)
