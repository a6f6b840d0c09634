"""Jobs of the caller: read, list, cancel, delete; the result cache and the webhook secret."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query

from deployments.protocol.errors import NotFound
from serve_app.admission.validation import find_card
from serve_app.api.auth import CurrentCaller
from serve_app.api.caller import CallerContext, JobId
from serve_app.api.schemas.job import AfterCancel, JobEnded, JobList, JobOut, WebhookSecret
from serve_app.jobs.job import Job, JobState
from serve_app.jobs.store.owner_index import JobFilter

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
    model: Annotated[str | None, Query(max_length=200, description="Only jobs of this model.")] = None,
    kind: Annotated[Literal["image", "video"] | None, Query(description="Only jobs of this kind.")] = None,
    q: Annotated[
        str | None, Query(max_length=200, description="Only jobs with this text in their prompt.")
    ] = None,
) -> JobList:
    """The caller's jobs, newest first."""
    where = JobFilter(status, None if model is None else _model_id(model, caller), kind, q)
    page = await caller.job_service.list(caller.owner, cursor=cursor, limit=limit, where=where)
    return JobList(jobs=[JobOut.of(job, caller.prefix) for job in page.jobs], next_cursor=page.next_cursor)


@router.delete("/api/generate/{task_id}")
async def cancel_or_delete(job_id: JobId, caller: CurrentCaller) -> JobEnded:
    """Cancel a job that waits or runs; delete one that has ended, with its files."""
    view = await caller.job_service.get(job_id, caller.owner)
    if view.job.state.ended:
        await caller.job_service.delete(job_id, caller.owner)
        return JobEnded(id=job_id, status="deleted")
    job = await caller.job_service.cancel(job_id, caller.owner)
    return JobEnded(id=job_id, status=_after_cancel(job))


def _model_id(name: str, caller: CallerContext) -> str:
    """The id of the model with this id or alias; the name itself for one that is served no more."""
    try:
        return find_card(name, caller.state.cards).id
    except NotFound:
        return name


def _after_cancel(job: Job) -> AfterCancel:
    """What became of a job that was to be cancelled; it may have ended by itself meanwhile."""
    match job.state:
        case JobState.completed:
            return "completed"
        case JobState.failed:
            return "failed"
        case JobState.cancelled:
            return "cancelled"
        case _:
            return "cancelling"
