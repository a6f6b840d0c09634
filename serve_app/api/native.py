"""The native dialect: wishes in, jobs out."""

from typing import Annotated

from fastapi import APIRouter, Query, Response
from starlette.requests import Request

from serve_app.api.request_body import documented, read_json_or_form
from serve_app.api.schemas.image import ImageBody
from serve_app.api.schemas.job import JobAccepted, JobEnded, JobList, JobOut, WarningOut, WebhookSecret
from serve_app.api.state import CurrentCaller, JobId
from serve_app.jobs.job import JobState

router = APIRouter(tags=["generate"])
FILES = ("image", "mask_image", "control_image")


@router.post("/api/generate/image", status_code=202, openapi_extra=documented(ImageBody, FILES))
async def generate_image(http_request: Request, response: Response, caller: CurrentCaller) -> JobAccepted:
    """Accept a wish for pictures and answer at once; the job is then followed by its id.

    JSON, or a multipart form with the files `image`, `mask_image` and `control_image`. With the header
    `Idempotency-Key` the same call again, within a day, is answered with the job there is.
    """
    body = await read_json_or_form(http_request, ImageBody, FILES)
    # the header Idempotency-Key is read by visit.submit, for every dialect
    job = await caller.submit(body)
    response.headers["Location"] = f"{caller.prefix}/api/generate/{job.id}"
    return JobAccepted(id=job.id, status=job.state, warnings=[WarningOut.of(c) for c in job.warnings])


@router.delete("/api/cache", status_code=204)
async def empty_cache(caller: CurrentCaller) -> None:
    """Forget all results of the caller for the purpose of answering equal requests; the jobs stay."""
    await caller.job_service.empty_cache(caller.owner)


@router.get("/api/webhooks/secret")
async def webhook_secret(caller: CurrentCaller) -> WebhookSecret:
    """What the caller's webhooks are signed with: give it to the receiver's Standard Webhooks library."""
    return WebhookSecret(secret=await caller.job_service.webhook_secret(caller.owner))


@router.get("/api/generate/{task_id}")
async def read_job(job_id: JobId, caller: CurrentCaller) -> JobOut:
    """One job as it stands: progress, warnings, and its pictures when they are there."""
    view = await caller.job_service.get(job_id, caller.owner)
    return JobOut.of(view.job, caller.prefix, view.position, view.starts_in_s)


@router.get("/api/generate/")
@router.get("/api/generate", include_in_schema=False)
async def list_jobs(
    caller: CurrentCaller,
    cursor: Annotated[
        str | None, Query(max_length=200, description="next_cursor of the page before.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    status: Annotated[JobState | None, Query(description="Only jobs in this state.")] = None,
    model: Annotated[str | None, Query(max_length=200, description="Only jobs of this model id.")] = None,
) -> JobList:
    """The caller's jobs, newest first."""
    page = await caller.job_service.list(caller.owner, cursor=cursor, limit=limit, state=status, model=model)
    return JobList(jobs=[JobOut.of(job, caller.prefix) for job in page.jobs], next_cursor=page.next_cursor)


@router.delete("/api/generate/{task_id}")
async def cancel_or_delete(job_id: JobId, caller: CurrentCaller) -> JobEnded:
    """Cancel a job that still waits or runs; delete one that has ended, with its pictures."""
    view = await caller.job_service.get(job_id, caller.owner)
    if view.job.state.ended:
        await caller.job_service.delete(job_id, caller.owner)
        return JobEnded(id=job_id, status="deleted")
    job = await caller.job_service.cancel(job_id, caller.owner)
    return JobEnded(id=job_id, status="cancelled" if job.state is JobState.cancelled else "cancelling")
