"""The task dialect: /generate-image, then status and result by task id."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from pydantic import BaseModel
from starlette.requests import Request

from deployments.protocol.errors import Cancelled, Conflict, NotFound
from serve_app.api.native import FILES
from serve_app.api.request_body import documented, read_json_or_form
from serve_app.api.schemas.image import ImageBody
from serve_app.api.schemas.job import EXTENSIONS, ArtifactOut, JobErrorOut, JobOut, WarningOut
from serve_app.api.state import CallerContext, CurrentCaller, JobId
from serve_app.jobs.job import Job, JobState

router = APIRouter(tags=["tasks"])


class TaskAccepted(BaseModel):
    task_id: str
    status: JobState
    warnings: list[WarningOut]


class TaskStatus(BaseModel):
    """How far a task is. Times are unix seconds."""

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


class TaskResult(BaseModel):
    """A finished task's pictures."""

    task_id: str
    status: JobState
    images: list[ArtifactOut]
    generation_s: float | None
    warnings: list[WarningOut]


@router.post("/generate-image", status_code=202, openapi_extra=documented(ImageBody, FILES))
async def generate_image(http_request: Request, caller: CurrentCaller) -> TaskAccepted:
    """Accept a wish for pictures; the body is that of POST /api/generate/image."""
    job = await caller.submit(await read_json_or_form(http_request, ImageBody, FILES))
    return TaskAccepted(task_id=job.id, status=job.state, warnings=[WarningOut.of(c) for c in job.warnings])


@router.post("/refine", status_code=202, openapi_extra=documented(ImageBody, FILES))
async def refine(http_request: Request, caller: CurrentCaller) -> TaskAccepted:
    """Redraw the details of the picture `image` with a refiner; the body is that of /generate-image."""
    body = await read_json_or_form(http_request, ImageBody, FILES)
    job = await caller.submit(body.model_copy(update={"refine": True}))
    return TaskAccepted(task_id=job.id, status=job.state, warnings=[WarningOut.of(c) for c in job.warnings])


@router.get("/task/{task_id}/status")
async def read_status(job_id: JobId, caller: CurrentCaller) -> TaskStatus:
    """How far the task is."""
    view = await caller.job_service.get(job_id, caller.owner)
    job = view.job
    return TaskStatus(
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


@router.get(
    "/task/{task_id}/result",
    response_model=TaskResult,
    responses={200: {"content": {"image/png": {}, "image/jpeg": {}, "image/webp": {}}}},
)
async def read_result(
    job_id: JobId,
    caller: CurrentCaller,
    accept: Annotated[str, Header()] = "",
    index: Annotated[int, Query(ge=0, description="Which picture, when asking for the file.")] = 0,
) -> TaskResult | Response:
    """The finished pictures as links, or one file for a client that asks with `Accept: image/*`.

    409 until the task has ended; a failed task answers with the error that ended it.
    """
    job = (await caller.job_service.get(job_id, caller.owner)).job
    _require_completed(job)
    if accept.strip().lower().startswith(("image/", "video/")):
        return await _picture(caller, job, index)
    out = JobOut.of(job, caller.prefix)
    return TaskResult(
        task_id=job.id,
        status=job.state,
        images=out.artifacts,
        generation_s=job.generation_s,
        warnings=out.warnings,
    )


def _require_completed(job: Job) -> None:
    if job.state is JobState.cancelled:
        raise Cancelled("this task was cancelled; it has no result")
    if job.state is JobState.failed:
        assert job.error is not None, "a failed job says why"
        raise job.error.to_error()
    if job.state is not JobState.completed:
        raise Conflict(f"this task is {job.state.value}; ask /task/{job.id}/status until it is completed")


async def _picture(caller: CallerContext, job: Job, index: int) -> Response:
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
