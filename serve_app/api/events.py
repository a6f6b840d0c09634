"""Progress as it happens: server-sent events with replay, and a WebSocket."""

import asyncio
import base64
import binascii
import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Header, Query
from starlette.responses import StreamingResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from deployments.protocol.errors import BadRequest, WeftError
from serve_app.api.schemas.job import JobOut
from serve_app.api.state import (
    ApiState,
    CallerContext,
    CurrentCaller,
    JobId,
    api_state,
    job_id,
    resolve_caller,
)
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
sockets = APIRouter()  # they name their caller themselves: a browser sends the key as a subprotocol

KEEP_ALIVE_S = 15.0
EVENT_ID = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")
MAX_MESSAGE_CHARS = 4096  # of a client; it has nothing to tell us
SUBPROTOCOL = "weft"
KEY_SUBPROTOCOL = "weft.key."  # then the key in base64url: browsers can set no header on a WebSocket

Item = TypeVar("Item")


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
    """Everything that happens to a job until it ends: queued, started, step, preview, stage, then
    completed, failed or cancelled.

    Every event has an id; send the last one as Last-Event-ID and only what came after it is told.
    A comment every 15 s keeps the line open.
    """
    since = _event_id(last_event_id or after)
    await caller.job_service.get(job_id, caller.owner)  # a wrong id is a 404, not an empty stream
    return StreamingResponse(
        _server_sent(caller, job_id, since),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _server_sent(caller: CallerContext, job_id: str, since: str | None) -> AsyncGenerator[str]:
    events = caller.job_service.follow(job_id, caller.owner, since)
    try:
        async for item in with_keep_alives(events, KEEP_ALIVE_S):
            if item is None:
                yield ": still here\n\n"
                continue
            event_id, event = item
            data = json.dumps(await _event_body(event, caller, job_id))
            yield f"id: {event_id}\nevent: {NAMES[type(event)]}\ndata: {data}\n\n"
    except WeftError as error:  # the store is away for long; the client comes again with its last id
        logger.warning("an event stream broke off", extra={"job_id": job_id, "error": error.message})


@sockets.websocket("/ws/{task_id}")
async def watch(
    websocket: WebSocket,
    task_id: str,
    state: Annotated[ApiState, Depends(api_state)],
    after: Annotated[str | None, Query()] = None,
    ticket: Annotated[str | None, Query()] = None,
) -> None:
    """The same events as messages: {"type": "progress", "percent", "step", "steps", ...}, then one of
    {"type": "complete", "job"}, {"type": "failed", "error"}, {"type": "cancelled"}.

    ticket: from POST /auth/ticket, for clients that can send neither header nor subprotocol.
    """
    offered = websocket.scope.get("subprotocols", [])
    caller = await resolve_caller(websocket, state, _offered_key(offered), ticket=ticket)
    watched, since = job_id(task_id), _event_id(after)
    await caller.job_service.get(watched, caller.owner)
    await websocket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in offered else None)
    # Only a reader sees that the client is gone; Serve does not cancel a socket that only sends.
    reader = asyncio.create_task(_read_until_gone(websocket))
    sender = asyncio.create_task(_send_until_ended(websocket, caller, watched, since))
    try:
        await asyncio.wait({reader, sender}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        reader.cancel()
        sender.cancel()
        results = await asyncio.gather(reader, sender, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, WebSocketDisconnect):
            raise result


async def _read_until_gone(websocket: WebSocket) -> None:
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return
        size = len(message.get("text") or message.get("bytes") or "")
        if size > MAX_MESSAGE_CHARS:
            await websocket.close(1009, f"messages are at most {MAX_MESSAGE_CHARS} bytes")
            return


async def _send_until_ended(
    websocket: WebSocket, caller: CallerContext, job_id: str, since: str | None
) -> None:
    """The server's own pings keep the line open meanwhile."""
    try:
        async for event_id, event in caller.job_service.follow(job_id, caller.owner, since):
            told = await _event_body(event, caller, job_id)
            message = {"type": _message_type(event), "event_id": event_id, **told}
            await websocket.send_text(json.dumps(message))
    except WeftError as error:  # as above
        await websocket.close(1013, error.message[:100])
    else:
        await websocket.close()


def _message_type(event: Event) -> str:
    match event:
        case JobQueued() | JobStarted() | Step() | Stage():
            return "progress"
        case JobCompleted():
            return "complete"
        case _:
            return NAMES[type(event)]


async def _event_body(event: Event, caller: CallerContext, job_id: str) -> dict[str, Any]:
    """The event's own words; an ending brings what a client would ask for next."""
    if isinstance(event, ENDINGS):
        caller.state.metrics.add("weft_jobs_finished_observed", state=NAMES[type(event)])
    match event:
        case JobQueued():
            return {"status": "queued", "position": event.position, **_taken_over(event)}
        case JobStarted():
            return {"status": "processing", **_taken_over(event), "steps": event.steps or None}
        case Step():
            return {
                "status": "processing",
                "percent": percent(event),
                "step": event.step,
                "steps": event.steps,
            }
        case Stage():
            told = {"status": "processing", "percent": percent(event), "stage": event.name}
            return {**told, "done": event.done, "total": event.total}
        case Preview():
            data = base64.b64encode(event.data).decode()
            return {"step": event.step, "media_type": event.media_type, "data": data}
        case JobCompleted():
            view = await caller.job_service.get(job_id, caller.owner)
            return {
                "status": "completed",
                "percent": percent(event),
                **_job(JobOut.of(view.job, caller.prefix)),
            }
        case Failed():
            error = {"kind": event.kind, "message": event.message, "param": event.param}
            return {"status": "failed", "error": error}
        case JobCancelled():
            return {"status": "cancelled"}


def _taken_over(event: JobQueued | JobStarted) -> dict[str, int | None]:
    return {"percent": percent(event), "step": event.step, "steps": event.steps}


def _job(job: JobOut) -> dict[str, Any]:
    return {"job": job.model_dump(mode="json")}


async def with_keep_alives(items: AsyncIterator[Item], pause_s: float) -> AsyncGenerator[Item | None]:
    """The items, and a None whenever none came for pause_s. Closes `items` when it is closed."""
    pending = asyncio.ensure_future(_next(items))
    try:
        while True:
            await asyncio.wait({pending}, timeout=pause_s)
            if not pending.done():
                yield None
                continue
            try:
                item = pending.result()
            except StopAsyncIteration:
                return
            yield item
            pending = asyncio.ensure_future(_next(items))
    finally:
        pending.cancel()
        await asyncio.gather(pending, return_exceptions=True)
        if isinstance(items, AsyncGenerator):
            await items.aclose()


async def _next(items: AsyncIterator[Item]) -> Item:
    return await anext(items)


def _event_id(given: str | None) -> str | None:
    if given is None or EVENT_ID.fullmatch(given):
        return given
    raise BadRequest(
        "Last-Event-ID must be the id of an event of this job, such as 1700000000000-0", param="Last-Event-ID"
    )


def _offered_key(subprotocols: list[str]) -> bytes | None:
    for offered in subprotocols:
        if offered.startswith(KEY_SUBPROTOCOL):
            text = offered.removeprefix(KEY_SUBPROTOCOL)
            try:
                return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            except (binascii.Error, ValueError):
                return b""
    return None
