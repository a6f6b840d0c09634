"""A job: a request with an owner, an id, a state and a result (pure)."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from enum import StrEnum

from deployments.protocol.errors import KINDS, Internal, WeftError
from deployments.protocol.request import ResolvedRequest
from deployments.validation.resolve import Adjustment
from serve_app.admission.quota import Charge

COPY_QUEUE = "=copies"  # the queue of jobs whose files are there already; no model id looks like that


class JobState(StrEnum):
    """queued -> processing -> one of completed, failed, cancelled; back to queued when a worker dies."""

    queued = "queued"
    processing = "processing"
    completed = "completed"
    failed = "failed"
    cancelled = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (JobState.completed, JobState.failed, JobState.cancelled)


@dataclass(frozen=True, slots=True)
class StoredArtifact:
    """One finished file in results storage."""

    index: int  # which picture of the job, 0..num_images-1
    kind: str  # "image" or "thumbnail"
    path: str  # relative to the results root; holds the job id
    media_type: str
    size_bytes: int
    sha256: str
    width: int  # pixels
    height: int
    seed: int


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a replica that was being stopped left off, and the file another one goes on from."""

    path: str  # relative to the results root
    sha256: str
    step: int  # steps done
    steps: int


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """An Idempotency-Key: what came with it first is the answer to all that comes with it later."""

    key: str
    digest: str  # of the call's body: the same key with another body is a mistake


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """What a caller wants of a job beside its pictures."""

    idempotency_key: IdempotencyKey | None = None
    cache_key: str | None = None  # cache key; requests of one owner with equal keys make equal pictures
    webhook: str | None = None  # URL that is told of the ending
    max_wait_s: float | None = None  # refused when it would wait longer before it begins
    images_per_day: int | None = None  # the owner's quota; None: there is none
    request_id: str = ""  # of the HTTP request that brought it, for logs
    trace: str = ""  # W3C traceparent of that request's span


DEFAULT_OPTIONS = SubmitOptions()


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed, in the words of the error tree."""

    kind: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    def to_error(self) -> WeftError:
        """The error this job ended with, ready to be raised to its caller."""
        kind = KINDS.get(self.kind, Internal)
        return kind(self.message, param=self.param, retry_after_s=self.retry_after_s)


@dataclass(frozen=True, slots=True)
class Job:
    """One accepted request as the store last knew it. Times are unix seconds of the store's clock."""

    id: str
    owner: str
    state: JobState
    request: ResolvedRequest  # its pictures are detached: see pictures.py
    created_at: float
    warnings: tuple[Adjustment, ...] = ()
    attempt: int = 0  # raised by every claim; the fence against late writers
    failures: int = 0  # attempts that were lost or failed for a passing reason; max_attempts ends the job
    cancel_requested: bool = False
    step: int = 0  # finished denoising steps of this attempt, with those it took over
    steps: int = 0  # of how many; 0 before the pipeline call begins
    resume_point: ResumePoint | None = None  # what the next attempt, or the running one, goes on from
    started_at: float | None = None  # of the latest attempt
    completed_at: float | None = None
    generation_s: float | None = None
    artifacts: tuple[StoredArtifact, ...] = ()
    error: JobError | None = None
    queue_score: float = 0.0  # its score in the queue: see turns.py
    cache_key: str | None = None  # its cache key
    leader: str | None = None  # an identical job in progress; this one waits for its files
    cached_from: str | None = None  # an identical job that has completed; this one copies its files
    webhook: str | None = None
    files_expired: bool = False  # its files were removed when their time was up
    charge: Charge | None = None  # what it took from its owner's quota
    request_id: str = ""  # of the HTTP request that brought it
    trace: str = ""  # W3C traceparent of that request's span

    @property
    def queue(self) -> str:
        """The queue it waits in, unless it waits for its leader."""
        return self.request.model if self.cached_from is None else COPY_QUEUE

    @property
    def cached(self) -> bool:
        """Whether its files are copies of those of an earlier job."""
        return self.state is JobState.completed and self.cached_from is not None

    @property
    def percent(self) -> int:
        """0..100; 99 at most until the files are stored."""
        if self.state is JobState.completed:
            return 100
        return min(99, 100 * self.step // self.steps) if self.steps else 0


def new_job_id() -> str:
    """128 random bits as 32 hex digits: not guessable, safe in file names."""
    return secrets.token_hex(16)
