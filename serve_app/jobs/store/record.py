"""A job as the fields of a Redis hash and back (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import TypeAdapter

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.request import ResolvedRequest
from serve_app.admission.quota import Charge
from serve_app.jobs.job import (
    IdempotencyKey,
    Job,
    JobError,
    JobState,
    NewJob,
    ResumePoint,
    StoredArtifact,
)

ADJUSTMENTS = TypeAdapter(tuple[Adjustment, ...])
ARTIFACTS = TypeAdapter(tuple[StoredArtifact, ...])
ERROR = TypeAdapter(JobError)
RESUME_POINT = TypeAdapter(ResumePoint)


@dataclass(frozen=True, slots=True)
class IdempotencyRecord:
    """The job that was first submitted with an Idempotency-Key, and the digest of its body."""

    job: str
    digest: str

    @classmethod
    def of(cls, job_id: str, key: IdempotencyKey) -> IdempotencyRecord:
        return cls(job_id, key.digest)


IDEMPOTENCY_RECORD = TypeAdapter(IdempotencyRecord)


def new_fields(
    new: NewJob,
    now_us: int,
    *,
    queue_score: float = 0.0,
    leader: str | None = None,
    cached_from: str | None = None,
) -> dict[str, str]:
    """The hash of a job that is accepted at `now_us` (microseconds of the server's clock)."""
    options = new.options
    optional = {
        "cache_key": options.cache_key,
        "webhook": options.webhook,
        "leader": leader,
        "cached_from": cached_from,
        "request_id": options.request_id or None,
        "trace": options.trace or None,
        "api_key": options.api_key or None,
        "price": repr(options.price_per_device_second) if options.price_per_device_second else None,
    }
    return {
        "state": JobState.queued.value,
        "owner": new.owner,
        "model": new.request.model,
        "request": new.request.model_dump_json(),
        "warnings": ADJUSTMENTS.dump_json(new.warnings).decode(),
        "created_us": str(now_us),
        "attempt": "0",
        "failures": "0",
        "queue_score": repr(queue_score),
        **{name: value for name, value in optional.items() if value is not None},
    }


def job_from(job_id: str, fields: Mapping[str, str]) -> Job:
    """The job in a hash; a field that is not there yet has its default."""
    error, generation_s, resume_point = (
        fields.get(name) for name in ("error", "generation_s", "resume_point")
    )
    return Job(
        id=job_id,
        owner=fields["owner"],
        state=JobState(fields["state"]),
        request=_request_from(fields["request"]),
        created_at=int(fields["created_us"]) / 1e6,
        warnings=ADJUSTMENTS.validate_json(fields["warnings"]),
        attempt=int(fields["attempt"]),
        failures=int(fields["failures"]),
        cancel_requested="cancel" in fields,
        step=int(fields.get("step", 0)),
        steps=int(fields.get("steps", 0)),
        resume_point=None if resume_point is None else RESUME_POINT.validate_json(resume_point),
        started_at=_seconds(fields.get("started_us")),
        completed_at=_seconds(fields.get("ended_us")),
        generation_s=None if generation_s is None else float(generation_s),
        artifacts=ARTIFACTS.validate_json(fields.get("artifacts", "[]")),
        error=None if error is None else ERROR.validate_json(error),
        queue_score=float(fields.get("queue_score", 0.0)),
        cache_key=fields.get("cache_key"),
        leader=fields.get("leader"),
        cached_from=fields.get("cached_from"),
        webhook=fields.get("webhook"),
        files_expired="files_expired" in fields,
        charge=None if "charge" not in fields else Charge.parse(fields["charge"]),
        device_us=int(fields.get("device_us", 0)),
        api_key=fields.get("api_key", ""),
        price_per_device_second=float(fields.get("price", 0.0)),
        request_id=fields.get("request_id", ""),
        trace=fields.get("trace", ""),
    )


def _request_from(text: str) -> ResolvedRequest:
    """The request of a record; records from before 0.1.0 hold one more field of a video, which is null."""
    return ResolvedRequest.model_validate_json(text.replace(',"frame":null', "", 1))


def _seconds(microseconds: str | None) -> float | None:
    return None if microseconds is None else int(microseconds) / 1e6
