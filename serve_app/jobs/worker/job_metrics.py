"""Metrics and log lines about the ends of attempts and jobs."""

from __future__ import annotations

import logging

from serve_app.jobs.job import Job, JobState
from serve_app.jobs.store.leases import Claim
from serve_app.jobs.usage import MICRO, amounts_of
from serve_app.observability.metrics import Meter

logger = logging.getLogger(__name__)


def attempt_fields(claim: Claim) -> dict[str, object]:
    """What every log line about an attempt carries."""
    return {"job_id": claim.job.id, "attempt": claim.attempt, "model": claim.job.request.model}


def log_attempt_end(claim: Claim, job: Job | None) -> None:
    """job: as the attempt left it; None: another worker has it."""
    if job is None:
        logger.warning("another worker has taken over a job", extra=attempt_fields(claim))
        return
    total_s = None if job.completed_at is None else job.completed_at - job.created_at
    queue_s = None if job.started_at is None else job.started_at - job.created_at
    figures = {"queue_s": queue_s, "generation_s": job.generation_s, "total_s": total_s}
    kind = None if job.error is None else job.error.kind
    logger.info("job %s", job.state, extra={**attempt_fields(claim), **figures, "error": kind})


def count_attempt_end(meter: Meter, job: Job) -> None:
    """Count a job that ended or was released; observe its times unless it copied files."""
    model = job.request.model
    if not job.state.ended:
        meter.add("weft_attempts_given_back_total", model=model)
        return
    meter.add(
        "weft_jobs_ended_total", model=model, state=job.state.value, error=job.error.kind if job.error else ""
    )
    used = amounts_of(job)
    for name, amount in (
        ("weft_job_device_seconds_total", used.device_us),
        ("weft_job_megapixels_total", used.pixels),
        ("weft_job_cost_total", used.cost_micros),
    ):
        if amount:  # Ray's counters refuse 0
            meter.add(name, amount / MICRO, model=model)
    if job.cached_from is None and job.started_at is not None:
        meter.observe("weft_job_wait_seconds", job.started_at - job.created_at, model=model)
        if job.state is JobState.completed and job.completed_at is not None:
            meter.observe("weft_job_total_seconds", job.completed_at - job.created_at, model=model)
