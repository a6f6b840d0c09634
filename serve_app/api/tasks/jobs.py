"""GET /task/{id}/status and /task/{id}/result."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Response

from deployments.protocol.errors import Cancelled, Conflict, NotFound
from serve_app.api.auth import CurrentCaller
from serve_app.api.caller import CallerContext, JobId
from serve_app.api.schemas.job import EXTENSIONS
from serve_app.api.tasks.schemas import TaskResult, TaskStatus
from serve_app.jobs.job import Job, JobState

router = APIRouter(tags=["tasks"])


@router.get("/task/{task_id}/status")
async def read_status(job_id: JobId, caller: CurrentCaller) -> TaskStatus:
    """The progress of a task."""
    return TaskStatus.of(await caller.job_service.get(job_id, caller.owner))


@router.get(
    "/task/{task_id}/result",
    response_model=TaskResult,
    responses={200: {"content": {"image/png": {}, "image/jpeg": {}, "image/webp": {}}}},
)
async def read_result(
    job_id: JobId,
    caller: CurrentCaller,
    accept: Annotated[str, Header()] = "",
    index: Annotated[int, Query(ge=0, description="Which image, when asking for the file.")] = 0,
) -> TaskResult | Response:
    """Links to the finished images, or one file for a client that asks with `Accept: image/*`.

    409 until the task has ended; a failed task answers with the error that ended it.
    """
    job = (await caller.job_service.get(job_id, caller.owner)).job
    _require_completed(job)
    if accept.strip().lower().startswith(("image/", "video/")):
        return await _file(caller, job, index)
    return TaskResult.of(job, caller.prefix)


def _require_completed(job: Job) -> None:
    if job.state is JobState.cancelled:
        raise Cancelled("this task was cancelled; it has no result")
    if job.state is JobState.failed:
        assert job.error is not None, "a failed job has an error"
        raise job.error.to_error()
    if job.state is not JobState.completed:
        raise Conflict(f"this task is {job.state.value}; ask /task/{job.id}/status until it is completed")


async def _file(caller: CallerContext, job: Job, index: int) -> Response:
    kind = "image" if job.request.video is None else "video"
    if not any(a.kind == kind and a.index == index for a in job.artifacts):
        raise NotFound(f"this task has {job.request.num_images} of them, counted from 0", param="index")
    stored, data = await caller.job_service.artifact(job.id, caller.owner, index, kind)
    name = f"weft-{job.id}-{index}.{EXTENSIONS[stored.media_type]}"
    return Response(
        data,
        headers={"Content-Disposition": f'inline; filename="{name}"'},
        media_type=stored.media_type,
    )
