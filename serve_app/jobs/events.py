"""What a job tells its followers: small facts, the last one Completed, Failed or Cancelled (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter

from serve_app.jobs.job import Job, JobState


@dataclass(frozen=True, slots=True)
class JobQueued:
    """Waiting; also told again when the position changes or a lost job comes back."""

    position: int  # 1: next to be claimed, among the jobs of the same model
    step: int = 0  # what a stopped replica has done; the next one goes on from there
    steps: int = 0


@dataclass(frozen=True, slots=True)
class JobStarted:
    """A dispatcher has claimed the job and hands it to the model."""

    attempt: int
    step: int = 0  # as above
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One denoising step is done; step 0 says that the pipeline call began."""

    step: int  # 0..steps
    steps: int
    percent: int  # 0..99


@dataclass(frozen=True, slots=True)
class Stage:
    """How far a video is after its last denoising step, in frames."""

    name: Literal["decode", "encode"]
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Preview:
    """A rough look at the unfinished picture."""

    __pydantic_config__ = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    step: int
    media_type: str
    data: bytes


@dataclass(frozen=True, slots=True)
class JobCompleted:
    """The files are stored and readable."""

    generation_s: float


@dataclass(frozen=True, slots=True)
class JobFailed:
    """The job ended without pictures; the words of the error tree."""

    kind: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class JobCancelled:
    """Somebody asked for the job to end."""


Event = JobQueued | JobStarted | Step | Stage | Preview | JobCompleted | JobFailed | JobCancelled
ENDINGS = (JobCompleted, JobFailed, JobCancelled)

_ADAPTERS: dict[str, TypeAdapter[Any]] = {
    "queued": TypeAdapter(JobQueued),
    "started": TypeAdapter(JobStarted),
    "step": TypeAdapter(Step),
    "stage": TypeAdapter(Stage),
    "preview": TypeAdapter(Preview),
    "completed": TypeAdapter(JobCompleted),
    "failed": TypeAdapter(JobFailed),
    "cancelled": TypeAdapter(JobCancelled),
}
NAMES: dict[type[Event], str] = {
    JobQueued: "queued",
    JobStarted: "started",
    Step: "step",
    Stage: "stage",
    Preview: "preview",
    JobCompleted: "completed",
    JobFailed: "failed",
    JobCancelled: "cancelled",
}


def encode(event: Event) -> dict[str, str]:
    """The event as the fields of a stream entry."""
    name = NAMES[type(event)]
    return {"event": name, "data": _ADAPTERS[name].dump_json(event).decode()}


def decode(fields: Mapping[str, str]) -> Event:
    """The event in a stream entry."""
    event: Event = _ADAPTERS[fields["event"]].validate_json(fields["data"])
    return event


def ending_event(job: Job) -> Event:
    """The last event of an ended job, for followers whose stream was trimmed or forgotten."""
    match job.state:
        case JobState.completed:
            return JobCompleted(job.generation_s or 0.0)
        case JobState.failed:
            assert job.error is not None, "a failed job says why"
            return JobFailed(job.error.kind, job.error.message, job.error.param)
        case JobState.cancelled:
            return JobCancelled()
        case _:
            raise AssertionError(f"job {job.id} has not ended")
