"""A job: a request with an owner, an id, a state and a result (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.errors import KINDS, Internal, WeftError
from deployments.protocol.request import ResolvedRequest
from serve_app.admission.quota import Charge

COPY_QUEUE = "=copies"  # the queue of jobs whose files exist already; no model id looks like that
RESTARTED = "restarted"  # code of the warning
MAX_RUNNING_PERCENT = 99  # 100 is shown once the files are stored


def percent_done(step: int, steps: int) -> int:
    """Share of denoising steps done by an unfinished job, 0..99; 0 while `steps` is unknown (0)."""
    if steps <= 0:
        return 0
    return max(0, min(MAX_RUNNING_PERCENT, 100 * step // steps))


def restarted(step: int, steps: int, reason: str) -> Adjustment:
    """The warning of a job that computes its first steps again. reason: why, as a part of a sentence."""
    return Adjustment(RESTARTED, "", f"{step} of {steps} steps are computed again: {reason}")


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

    index: int  # which image or video of the job, 0..num_images-1
    kind: str  # image, thumbnail, video, poster or spritesheet
    path: str  # relative to the results root; contains the job id
    media_type: str
    size_bytes: int
    sha256: str
    width: int  # pixels
    height: int
    seed: int


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """What the next attempt starts from: a file with the state of a stopped replica, or of one in between."""

    path: str  # relative to the results root
    sha256: str
    step: int  # denoising steps done
    steps: int
    attempt: int = 0  # that reached it


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """An Idempotency-Key header: the first job submitted with it answers every later submit with it."""

    key: str
    digest: str  # of the call's body: the same key with another body is a conflict


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """What a submit asks for besides the generation itself."""

    idempotency_key: IdempotencyKey | None = None
    cache_key: str | None = None  # requests of one owner with equal keys have equal results
    webhook: str | None = None  # URL that receives the ending
    max_wait_s: float | None = None  # reject the job when it would wait longer before it starts
    images_per_day: int | None = None  # the owner's quota; None: no quota
    api_key: str = ""  # prefix of the key that submitted it, for usage
    price_per_device_second: float = 0.0  # of its model when it was submitted
    request_id: str = ""  # of the HTTP request that submitted it, for logs
    trace: str = ""  # W3C traceparent of that request's span


DEFAULT_OPTIONS = SubmitOptions()


@dataclass(frozen=True, slots=True)
class NewJob:
    """A resolved request on its way into the store."""

    id: str
    owner: str
    request: ResolvedRequest  # its input images are detached, see inputs.py
    warnings: tuple[Adjustment, ...] = ()
    options: SubmitOptions = DEFAULT_OPTIONS


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed: kind and fields of the error tree in deployments/protocol/errors.py."""

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
    """One accepted request as last read from the store. Times are unix seconds of the store's clock."""

    id: str
    owner: str
    state: JobState
    request: ResolvedRequest  # its input images are detached, see inputs.py
    created_at: float
    warnings: tuple[Adjustment, ...] = ()
    attempt: int = 0  # incremented by every claim; fences off writers of earlier attempts
    failures: int = 0  # attempts that were lost or failed for a transient reason; max_attempts ends the job
    cancel_requested: bool = False
    step: int = 0  # denoising steps done, including those before a resume point
    steps: int = 0  # of how many; 0 before the pipeline call starts
    resume_point: ResumePoint | None = None  # where the next attempt, or the running one, starts
    started_at: float | None = None  # of the latest attempt
    completed_at: float | None = None
    generation_s: float | None = None
    artifacts: tuple[StoredArtifact, ...] = ()
    error: JobError | None = None
    queue_score: float = 0.0  # its score in its model's queue, see store/fair_queue.py
    cache_key: str | None = None
    leader: str | None = None  # id of an identical job in progress, whose files this one waits for
    cached_from: str | None = None  # id of an identical completed job, whose files this one copies
    webhook: str | None = None
    files_expired: bool = False  # its files were removed after their retention time
    charge: Charge | None = None  # what it took from its owner's quota
    device_us: int = 0  # device microseconds, of all attempts
    api_key: str = ""  # prefix of the key that submitted it
    price_per_device_second: float = 0.0  # of its model when it was accepted, in the operator's currency
    request_id: str = ""  # of the HTTP request that submitted it
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
        """0..100; at most 99 until the files are stored."""
        if self.state is JobState.completed:
            return 100
        return percent_done(self.step, self.steps)
