"""A job as the fields of a Redis hash and back, and the names of all our keys (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import TypeAdapter

from deployments.protocol.request import ResolvedRequest
from deployments.validation.resolve import Adjustment
from serve_app.admission.quota import Charge
from serve_app.jobs.job import (
    DEFAULT_OPTIONS,
    IdempotencyKey,
    Job,
    JobError,
    JobState,
    ResumePoint,
    StoredArtifact,
    SubmitOptions,
)

ADJUSTMENTS = TypeAdapter(tuple[Adjustment, ...])
ARTIFACTS = TypeAdapter(tuple[StoredArtifact, ...])
ERROR = TypeAdapter(JobError)
RESUME_POINT = TypeAdapter(ResumePoint)


@dataclass(frozen=True, slots=True)
class IdempotencyRecord:
    """What an Idempotency-Key was first used for."""

    job: str
    digest: str

    @classmethod
    def of(cls, job_id: str, idempotency_key: IdempotencyKey) -> IdempotencyRecord:
        return cls(job_id, idempotency_key.digest)


IDEMPOTENCY_RECORD = TypeAdapter(IdempotencyRecord)


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

    def fair_queue(self, model: str) -> str:
        """HASH: the turn that runs (v), and per flow the turns it used up (turns.py)."""
        return f"{self.prefix}fairqueue:{model}"

    @property
    def arrivals(self) -> str:
        """STRING: how many jobs took a turn, of any model."""
        return f"{self.prefix}arrivals"

    def idempotency_key(self, owner: str, key_digest: str) -> str:
        """STRING: the first job that came with an owner's Idempotency-Key, and the digest of its body."""
        return f"{self.prefix}idempotency:{owner}:{key_digest}"

    def cache_key(self, cache_key: str) -> str:
        """STRING: the job that makes, or has made, the files of all requests with this cache key."""
        return f"{self.prefix}cache:{cache_key}"

    def followers(self, job_id: str) -> str:
        """ZSET of jobs that wait for the files of this one, by time of acceptance."""
        return f"{self.prefix}followers:{job_id}"

    def epoch(self, owner: str) -> str:
        """STRING: how often an owner's cache was emptied."""
        return f"{self.prefix}epoch:{owner}"

    def quota(self, owner: str) -> str:
        """HASH: pictures by day, of an owner who has a quota."""
        return f"{self.prefix}quota:{owner}"

    def durations(self, model: str) -> str:
        """LIST: seconds that the latest jobs of a model took."""
        return f"{self.prefix}durations:{model}"

    def capacity(self, model: str) -> str:
        """HASH: per dispatcher, its slots of a model, how many are free, and when it said so."""
        return f"{self.prefix}capacity:{model}"

    @property
    def expiring(self) -> str:
        """ZSET of ended jobs whose files are still there, by when they go."""
        return f"{self.prefix}expiring"

    @property
    def outbox(self) -> str:
        """ZSET of ended jobs whose webhook has not been told, by when to try next."""
        return f"{self.prefix}outbox"

    def maintenance_lock(self, name: str) -> str:
        """STRING: somebody does this chore now."""
        return f"{self.prefix}maintenance:{name}"

    @property
    def secret(self) -> str:
        """STRING: what this installation's cache keys and webhook secrets are derived from."""
        return f"{self.prefix}secret"

    @property
    def work_channel(self) -> str:
        """Hints for dispatchers: there is new work; a running job shall be cancelled."""
        return f"{self.prefix}wakeups:work"

    @property
    def events_channel(self) -> str:
        """Hints for followers: a job has a new event."""
        return f"{self.prefix}wakeups:events"


def new_fields(
    owner: str,
    request: ResolvedRequest,
    warnings: tuple[Adjustment, ...],
    now_us: int,
    *,
    options: SubmitOptions = DEFAULT_OPTIONS,
    queue_score: float = 0.0,
    leader: str | None = None,
    cached_from: str | None = None,
) -> dict[str, str]:
    """The hash of a job that was accepted just now."""
    given = {
        "cache_key": options.cache_key,
        "webhook": options.webhook,
        "leader": leader,
        "cached_from": cached_from,
        "request_id": options.request_id or None,
        "trace": options.trace or None,
    }
    return {
        "state": JobState.queued.value,
        "owner": owner,
        "model": request.model,
        "request": request.model_dump_json(),
        "warnings": ADJUSTMENTS.dump_json(warnings).decode(),
        "created_us": str(now_us),
        "attempt": "0",
        "failures": "0",
        "queue_score": repr(queue_score),
        **{name: value for name, value in given.items() if value is not None},
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
        request=ResolvedRequest.model_validate_json(fields["request"]),
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
        request_id=fields.get("request_id", ""),
        trace=fields.get("trace", ""),
    )


def _seconds(microseconds: str | None) -> float | None:
    return None if microseconds is None else int(microseconds) / 1e6
