"""What happens to a job, in order: the events its followers receive, and how they are stored (pure).

Step, Stage, Preview and Failed come from the replica unchanged; the other events are about the whole job.
The last event of a job is JobCompleted, Failed or JobCancelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from deployments.protocol.events import Failed, Preview, Stage, Step
from serve_app.jobs.job import MAX_RUNNING_PERCENT, Job, JobState, percent_done

__all__ = [
    "ENDINGS",
    "NAMES",
    "Event",
    "Failed",
    "JobCancelled",
    "JobCompleted",
    "JobQueued",
    "JobStarted",
    "Preview",
    "Stage",
    "Step",
    "decode",
    "encode",
    "ending_event",
    "percent",
]


@dataclass(frozen=True, slots=True)
class JobQueued:
    """The job waits; repeated when its position changes and when it returns to the queue."""

    position: int  # 1: next to be claimed among the jobs of the same model
    step: int = 0  # denoising steps that a stopped replica has done; the next attempt continues after them
    steps: int = 0


@dataclass(frozen=True, slots=True)
class JobStarted:
    """A worker has claimed the job and sends it to the model."""

    attempt: int
    step: int = 0  # as in JobQueued
    steps: int = 0


@dataclass(frozen=True, slots=True)
class JobCompleted:
    """The files are stored and readable."""

    generation_s: float


@dataclass(frozen=True, slots=True)
class JobCancelled:
    """The job ended because its cancellation was requested."""


Event = JobQueued | JobStarted | Step | Stage | Preview | JobCompleted | Failed | JobCancelled
ENDINGS = (JobCompleted, Failed, JobCancelled)

_TYPES: dict[str, type[Event]] = {
    "queued": JobQueued,
    "started": JobStarted,
    "step": Step,
    "stage": Stage,
    "preview": Preview,
    "completed": JobCompleted,
    "failed": Failed,
    "cancelled": JobCancelled,
}
NAMES: dict[type[Event], str] = {kind: name for name, kind in _TYPES.items()}
_ADAPTERS: dict[str, TypeAdapter[Any]] = {name: TypeAdapter(kind) for name, kind in _TYPES.items()}


def encode(event: Event) -> dict[str, str]:
    """The event as the fields of a stream entry."""
    name = NAMES[type(event)]
    return {"event": name, "data": _ADAPTERS[name].dump_json(event).decode()}


def decode(fields: Mapping[str, str]) -> Event:
    """The event in a stream entry."""
    event: Event = _ADAPTERS[fields["event"]].validate_json(fields["data"])
    return event


def percent(event: Event) -> int | None:
    """How much of the job is done by this event, 0..100; None for events that do not say it."""
    match event:
        case JobQueued(step=step, steps=steps) | JobStarted(step=step, steps=steps) | Step(step, steps):
            return percent_done(step, steps)
        case Stage():
            return MAX_RUNNING_PERCENT  # all steps are done; what is left is counted in frames
        case JobCompleted():
            return 100
        case _:
            return None


def ending_event(job: Job) -> Event:
    """The last event of an ended job, for followers whose stream was trimmed or deleted."""
    match job.state:
        case JobState.completed:
            return JobCompleted(job.generation_s or 0.0)
        case JobState.failed:
            assert job.error is not None, "a failed job has an error"
            return Failed.of(job.error.to_error())
        case JobState.cancelled:
            return JobCancelled()
        case _:
            raise AssertionError(f"job {job.id} has not ended")
