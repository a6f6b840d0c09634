"""A job: a request with an owner, an id, a state and a result (pure)."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from enum import StrEnum

from deployments.protocol.errors import KINDS, Internal, WeftError
from deployments.protocol.limits import Correction
from deployments.protocol.request import FittedRequest


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
class Handover:
    """Where a replica that was being stopped left off, and the file another one goes on from."""

    path: str  # relative to the results root
    sha256: str
    step: int  # steps done
    steps: int


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
    request: FittedRequest  # its pictures are detached: see pictures.py
    created_at: float
    warnings: tuple[Correction, ...] = ()
    attempt: int = 0  # raised by every claim; the fence against late writers
    failures: int = 0  # attempts that were lost or failed for a passing reason; max_attempts ends the job
    cancel_requested: bool = False
    step: int = 0  # finished denoising steps of this attempt, with those it took over
    steps: int = 0  # of how many; 0 before the pipeline call begins
    handover: Handover | None = None  # what the next attempt, or the running one, goes on from
    started_at: float | None = None  # of the latest attempt
    completed_at: float | None = None
    generation_s: float | None = None
    artifacts: tuple[StoredArtifact, ...] = ()
    error: JobError | None = None

    @property
    def percent(self) -> int:
        """0..100; 99 at most until the files are stored."""
        if self.state is JobState.completed:
            return 100
        return min(99, 100 * self.step // self.steps) if self.steps else 0


def new_job_id() -> str:
    """128 random bits as 32 hex digits: not guessable, safe in file names."""
    return secrets.token_hex(16)
