"""A job as the fields of a Redis hash and back, and the names of all our keys (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import TypeAdapter

from deployments.protocol.limits import Correction
from deployments.protocol.request import FittedRequest
from serve_app.jobs.job import Handover, Job, JobError, JobState, StoredArtifact

CORRECTIONS = TypeAdapter(tuple[Correction, ...])
ARTIFACTS = TypeAdapter(tuple[StoredArtifact, ...])
ERROR = TypeAdapter(JobError)
HANDOVER = TypeAdapter(Handover)


@dataclass(frozen=True, slots=True)
class Keys:
    """Every key and channel, under one prefix (the server's ACL allows no other)."""

    prefix: str

    def job(self, job_id: str) -> str:
        """HASH: the only truth about a job."""
        return f"{self.prefix}job:{job_id}"

    def events(self, job_id: str) -> str:
        """STREAM: what happened to a job, for replay."""
        return f"{self.prefix}events:{job_id}"

    @property
    def pending(self) -> str:
        """ZSET of all queued jobs by time of acceptance: bounds the queue."""
        return f"{self.prefix}pending"

    def pending_of(self, model: str) -> str:
        """ZSET of one model's queued jobs: what a dispatcher claims from; the rank is the position."""
        return f"{self.prefix}pending:{model}"

    @property
    def running(self) -> str:
        """ZSET of jobs under a lease by its deadline: what the reaper looks at."""
        return f"{self.prefix}running"

    def active(self, owner: str) -> str:
        """SET of an owner's queued and running jobs; gone when there are none."""
        return f"{self.prefix}active:{owner}"

    def owner(self, owner: str) -> str:
        """ZSET of an owner's jobs by time of acceptance: what lists are read from."""
        return f"{self.prefix}owner:{owner}"

    @property
    def work_channel(self) -> str:
        """Hints for dispatchers: there is new work; a running job shall be cancelled."""
        return f"{self.prefix}hints:work"

    @property
    def news_channel(self) -> str:
        """Hints for followers: a job has a new event."""
        return f"{self.prefix}hints:news"


def new_fields(
    owner: str, request: FittedRequest, warnings: tuple[Correction, ...], now_us: int
) -> dict[str, str]:
    """The hash of a job that was accepted just now."""
    return {
        "state": JobState.queued.value,
        "owner": owner,
        "model": request.model,
        "request": request.model_dump_json(),
        "warnings": CORRECTIONS.dump_json(warnings).decode(),
        "created_us": str(now_us),
        "attempt": "0",
        "failures": "0",
    }


def job_from(job_id: str, fields: Mapping[str, str]) -> Job:
    """The job in a hash; a field that is not there yet has its default."""
    error, generation_s, handover = (fields.get(name) for name in ("error", "generation_s", "handover"))
    return Job(
        id=job_id,
        owner=fields["owner"],
        state=JobState(fields["state"]),
        request=FittedRequest.model_validate_json(fields["request"]),
        created_at=int(fields["created_us"]) / 1e6,
        warnings=CORRECTIONS.validate_json(fields["warnings"]),
        attempt=int(fields["attempt"]),
        failures=int(fields["failures"]),
        cancel_requested="cancel" in fields,
        step=int(fields.get("step", 0)),
        steps=int(fields.get("steps", 0)),
        handover=None if handover is None else HANDOVER.validate_json(handover),
        started_at=_seconds(fields.get("started_us")),
        completed_at=_seconds(fields.get("ended_us")),
        generation_s=None if generation_s is None else float(generation_s),
        artifacts=ARTIFACTS.validate_json(fields.get("artifacts", "[]")),
        error=None if error is None else ERROR.validate_json(error),
    )


def _seconds(microseconds: str | None) -> float | None:
    return None if microseconds is None else int(microseconds) / 1e6
