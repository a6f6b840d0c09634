"""Jobs of the caller: read, list, cancel, delete; the result cache and the webhook secret."""

from typing import Annotated

from fastapi import APIRouter, Query

from serve_app.api.auth import CurrentCaller
from serve_app.api.caller import JobId
from serve_app.api.schemas.job import JobEnded, JobList, JobOut, WebhookSecret
from serve_app.jobs.job import JobState

router = APIRouter(tags=["generate"])


@router.delete("/api/cache", status_code=204)
async def empty_cache(caller: CurrentCaller) -> None:
    """Stop answering the caller's requests with results of earlier equal ones; the jobs stay."""
    await caller.job_service.empty_cache(caller.owner)


@router.get("/api/webhooks/secret")
async def webhook_secret(caller: CurrentCaller) -> WebhookSecret:
    """The secret that signs the caller's webhooks, for the receiver's Standard Webhooks library."""
    return WebhookSecret(secret=await caller.job_service.webhook_secret(caller.owner))


@router.get("/api/generate/{task_id}")
async def read_job(job_id: JobId, caller: CurrentCaller) -> JobOut:
    """The current state of one job: progress, warnings, and its images once they exist."""
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
    """Cancel a job that waits or runs; delete one that has ended, with its files."""
    view = await caller.job_service.get(job_id, caller.owner)
    if view.job.state.ended:
        await caller.job_service.delete(job_id, caller.owner)
        return JobEnded(id=job_id, status="deleted")
    job = await caller.job_service.cancel(job_id, caller.owner)
    return JobEnded(id=job_id, status="cancelled" if job.state is JobState.cancelled else "cancelling")
