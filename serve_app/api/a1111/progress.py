"""/sdapi/v1/progress, interrupt and skip: of the caller's calls in this dialect, of no one else's."""

from __future__ import annotations

import asyncio
import base64
import time
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel

from deployments.protocol.errors import NotFound
from deployments.protocol.request import OutputOptions
from serve_app.api.a1111.memory import recent_jobs
from serve_app.api.auth import CurrentCaller
from serve_app.api.caller import CallerContext
from serve_app.api.openai.partial_images import partial_image
from serve_app.jobs.job import Job, JobState

router = APIRouter(tags=["a1111"])
RequestId = Annotated[
    str | None, Query(max_length=100, description="force_task_id of one call; without it, of all.")
]


class ProgressState(BaseModel):
    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = 0
    job_timestamp: str = "0"
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class A1111Progress(BaseModel):
    """How far the caller's calls are; 0 while there are none."""

    progress: float
    eta_relative: float
    state: ProgressState
    current_image: str | None = None
    textinfo: str | None = None


@router.get("/sdapi/v1/progress")
async def read_progress(
    caller: CurrentCaller, skip_current_image: bool = False, request_id: RequestId = None
) -> A1111Progress:
    """The progress of the caller's unfinished calls, with the latest preview."""
    jobs = await _unfinished(caller, request_id)
    if not jobs:
        return A1111Progress(progress=0.0, eta_relative=0.0, state=ProgressState())
    current = next((job for job in jobs if job.state is JobState.processing), jobs[0])
    done = sum(job.percent for job in jobs) / (100 * len(jobs))
    spent_s = time.time() - min(job.created_at for job in jobs)
    return A1111Progress(
        progress=max(done, 0.001),  # 0 would say that nothing runs
        eta_relative=spent_s / done - spent_s if done else 0.0,
        state=ProgressState(
            interrupted=current.cancel_requested,
            job=current.id,
            job_count=len(jobs),
            job_timestamp=time.strftime("%Y%m%d%H%M%S", time.gmtime(current.created_at)),
            sampling_step=current.step,
            sampling_steps=current.steps or current.request.num_inference_steps,
        ),
        current_image=None if skip_current_image else await _preview(caller, current),
        textinfo="Waiting..." if current.state is JobState.queued else None,
    )


@router.post("/sdapi/v1/interrupt")
async def interrupt(caller: CurrentCaller, request_id: RequestId = None) -> dict[str, Any]:
    """Cancel the caller's unfinished calls. What was finished before is answered."""
    for job in await _unfinished(caller, request_id):
        await caller.job_service.cancel(job.id, caller.owner)
    return {}


@router.post("/sdapi/v1/skip")
async def skip(caller: CurrentCaller, request_id: RequestId = None) -> dict[str, Any]:
    """Cancel what is generated now, and go on with the rest of the call."""
    for job in (await _unfinished(caller, request_id))[:1]:
        await caller.job_service.cancel(job.id, caller.owner)
    return {}


async def _unfinished(caller: CallerContext, task: str | None) -> list[Job]:
    """The oldest first."""
    found = []
    for job_id in await recent_jobs(caller, task):
        with suppress(NotFound):  # deleted
            found.append((await caller.job_service.get(job_id, caller.owner)).job)
    return [job for job in found if not job.state.ended]


async def _preview(caller: CallerContext, job: Job) -> str | None:
    preview = await caller.job_service.latest_preview(job.id, caller.owner)
    if preview is None:
        return None
    size = job.request.width, job.request.height
    image = await asyncio.to_thread(partial_image, preview.data, OutputOptions(), *size)
    return base64.b64encode(image).decode()
