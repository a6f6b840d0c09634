"""The events of a job as they happen: server-sent events with replay."""

import base64
import json
import logging
import re
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from starlette.responses import StreamingResponse

from deployments.protocol.errors import BadRequest, WeftError
from serve_app.api import sse
from serve_app.api.auth import CurrentCaller
from serve_app.api.caller import CallerContext, JobId
from serve_app.api.schemas.job import JobOut
from serve_app.jobs.events import (
    ENDINGS,
    NAMES,
    Event,
    Failed,
    JobCancelled,
    JobCompleted,
    JobQueued,
    JobStarted,
    Preview,
    Stage,
    Step,
    percent,
)

logger = logging.getLogger(__name__)

router = APIRouter(tags=["progress"])

EVENT_ID = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")


@router.get(
    "/api/generate/{task_id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def stream_events(
    job_id: JobId,
    caller: CurrentCaller,
    last_event_id: Annotated[str | None, Header()] = None,
    after: Annotated[str | None, Query(description="As Last-Event-ID, for clients without headers.")] = None,
) -> StreamingResponse:
    """All events of a job until it ends: queued, started, step, preview, stage, then completed, failed or
    cancelled.

    Every event has an id; with the last one as Last-Event-ID only later events are sent.
    A comment every 15 s keeps the connection open.
    """
    since = parse_event_id(last_event_id or after)
    await caller.job_service.get(job_id, caller.owner)  # a wrong id is a 404, not an empty stream
    return sse.response(_stream(caller, job_id, since))


async def _stream(caller: CallerContext, job_id: str, since: str | None) -> AsyncGenerator[bytes]:
    events = caller.job_service.follow(job_id, caller.owner, since)
    try:
        async for item in sse.with_keep_alives(events):
            if item is None:
                yield sse.KEEP_ALIVE
                continue
            event_id, event = item
            body = await event_body(event, caller, job_id)
            yield sse.event(NAMES[type(event)], json.dumps(body), event_id)
    except WeftError as error:  # the store is away for long; the client reconnects with its last id
        logger.warning("event stream ended early", extra={"job_id": job_id, "error": error.message})


async def event_body(event: Event, caller: CallerContext, job_id: str) -> dict[str, Any]:
    """The event as JSON; the last event of a completed job carries the job itself."""
    if isinstance(event, ENDINGS):
        caller.state.metrics.add("weft_jobs_finished_observed_total", state=NAMES[type(event)])
    match event:
        case JobQueued():
            return {"status": "queued", "position": event.position, **_resumed_progress(event)}
        case JobStarted():
            return {"status": "processing", **_resumed_progress(event), "steps": event.steps or None}
        case Step():
            return {
                "status": "processing",
                "percent": percent(event),
                "step": event.step,
                "steps": event.steps,
            }
        case Stage():
            return {
                "status": "processing",
                "percent": percent(event),
                "stage": event.name,
                "done": event.done,
                "total": event.total,
            }
        case Preview():
            data = base64.b64encode(event.data).decode()
            return {"step": event.step, "media_type": event.media_type, "data": data}
        case JobCompleted():
            view = await caller.job_service.get(job_id, caller.owner)
            job = JobOut.of(view.job, caller.prefix).model_dump(mode="json")
            return {"status": "completed", "percent": percent(event), "job": job}
        case Failed():
            error = {"kind": event.kind, "message": event.message, "param": event.param}
            return {"status": "failed", "error": error}
        case JobCancelled():
            return {"status": "cancelled"}


def _resumed_progress(event: JobQueued | JobStarted) -> dict[str, int | None]:
    """Progress of the job's earlier attempt, from which it continues."""
    return {"percent": percent(event), "step": event.step, "steps": event.steps}


def parse_event_id(text: str | None) -> str | None:
    """Raises BadRequest for text that is no event id."""
    if text is None or EVENT_ID.fullmatch(text):
        return text
    raise BadRequest(
        "Last-Event-ID must be the id of an event of this job, such as 1700000000000-0", param="Last-Event-ID"
    )
