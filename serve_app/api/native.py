"""The native dialect: wishes in, jobs out."""

from typing import Annotated

from fastapi import APIRouter, Query, Response
from starlette.requests import Request

from serve_app.api.bodies import documented, read_json_or_form
from serve_app.api.depends import Here, JobId
from serve_app.api.schemas.image import ImageBody
from serve_app.api.schemas.job import Accepted, Ended, JobOut, JobPage, Warned, WebhookSecret
from serve_app.jobs.job import JobState

router = APIRouter(tags=["generate"])
FILES = ("image", "mask_image", "control_image")


@router.post("/api/generate/image", status_code=202, openapi_extra=documented(ImageBody, FILES))
async def generate_image(http_request: Request, response: Response, visit: Here) -> Accepted:
    """Accept a wish for pictures and answer at once; the job is then followed by its id.

    JSON, or a multipart form with the files `image`, `mask_image` and `control_image`. With the header
    `Idempotency-Key` the same call again, within a day, is answered with the job there is.
    """
    body = await read_json_or_form(http_request, ImageBody, FILES)
    # the header Idempotency-Key is read by visit.submit, for every dialect
    job = await visit.submit(body)
    response.headers["Location"] = f"{visit.prefix}/api/generate/{job.id}"
    return Accepted(id=job.id, status=job.state, warnings=[Warned.of(c) for c in job.warnings])


@router.delete("/api/cache", status_code=204)
async def empty_cache(visit: Here) -> None:
    """Forget all results of the caller for the purpose of answering equal requests; the jobs stay."""
    await visit.desk.empty_cache(visit.owner)


@router.get("/api/webhooks/secret")
async def webhook_secret(visit: Here) -> WebhookSecret:
    """What the caller's webhooks are signed with: give it to the receiver's Standard Webhooks library."""
    return WebhookSecret(secret=await visit.desk.webhook_secret(visit.owner))


@router.get("/api/generate/{task_id}")
async def read_job(job_id: JobId, visit: Here) -> JobOut:
    """One job as it stands: progress, warnings, and its pictures when they are there."""
    view = await visit.desk.get(job_id, visit.owner)
    return JobOut.of(view.job, visit.prefix, view.position, view.starts_in_s)


@router.get("/api/generate/")
@router.get("/api/generate", include_in_schema=False)
async def list_jobs(
    visit: Here,
    cursor: Annotated[
        str | None, Query(max_length=200, description="next_cursor of the page before.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    status: Annotated[JobState | None, Query(description="Only jobs in this state.")] = None,
    model: Annotated[str | None, Query(max_length=200, description="Only jobs of this model id.")] = None,
) -> JobPage:
    """The caller's jobs, newest first."""
    page = await visit.desk.list(visit.owner, cursor=cursor, limit=limit, state=status, model=model)
    return JobPage(jobs=[JobOut.of(job, visit.prefix) for job in page.jobs], next_cursor=page.next_cursor)


@router.delete("/api/generate/{task_id}")
async def cancel_or_delete(job_id: JobId, visit: Here) -> Ended:
    """Cancel a job that still waits or runs; delete one that has ended, with its pictures."""
    view = await visit.desk.get(job_id, visit.owner)
    if view.job.state.ended:
        await visit.desk.delete(job_id, visit.owner)
        return Ended(id=job_id, status="deleted")
    job = await visit.desk.cancel(job_id, visit.owner)
    return Ended(id=job_id, status="cancelled" if job.state is JobState.cancelled else "cancelling")
