"""Answers of the task dialect."""

from typing import Self

from pydantic import BaseModel

from serve_app.api.schemas.job import ArtifactOut, JobErrorOut, JobOut, WarningOut
from serve_app.jobs.job import Job, JobState
from serve_app.jobs.service import JobView


class TaskAccepted(BaseModel):
    """The task is stored; it is followed by its id."""

    task_id: str
    status: JobState
    warnings: list[WarningOut]

    @classmethod
    def of(cls, job: Job) -> Self:
        return cls(task_id=job.id, status=job.state, warnings=WarningOut.all_of(job))


class TaskStatus(BaseModel):
    """The progress of a task. Times are unix seconds."""

    task_id: str
    status: JobState
    progress: int  # percent
    step: int
    steps: int
    position: int | None
    created_at: float
    started_at: float | None
    completed_at: float | None
    error: JobErrorOut | None

    @classmethod
    def of(cls, view: JobView) -> Self:
        job = view.job
        return cls(
            task_id=job.id,
            status=job.state,
            progress=job.percent,
            step=job.step,
            steps=job.steps,
            position=view.position,
            created_at=job.created_at,
            started_at=job.started_at,
            completed_at=job.completed_at,
            error=None if job.error is None else JobErrorOut.of(job.error),
        )


class TaskResult(BaseModel):
    """The images or the video of a finished task."""

    task_id: str
    status: JobState
    images: list[ArtifactOut]
    generation_s: float | None
    warnings: list[WarningOut]

    @classmethod
    def of(cls, job: Job, prefix: str) -> Self:
        """prefix: what precedes /api in links."""
        out = JobOut.of(job, prefix)
        return cls(
            task_id=job.id,
            status=job.state,
            images=out.artifacts,
            generation_s=job.generation_s,
            warnings=out.warnings,
        )
