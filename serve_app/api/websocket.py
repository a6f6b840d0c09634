"""The events of a job as WebSocket messages."""

import asyncio
import base64
import binascii
import json
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.websockets import WebSocket, WebSocketDisconnect

from deployments.protocol.errors import WeftError
from serve_app.api.auth import authenticate
from serve_app.api.caller import CallerContext, parse_job_id
from serve_app.api.events import event_body, parse_event_id
from serve_app.api.state import CurrentState
from serve_app.jobs.events import NAMES, Event, JobCompleted, JobQueued, JobStarted, Stage, Step

router = APIRouter()  # without get_caller: a browser sends its key as a subprotocol or a ticket

MAX_MESSAGE_CHARS = 4096  # of a client, whose messages are ignored
SUBPROTOCOL = "weft"
KEY_SUBPROTOCOL = "weft.key."  # then the key in base64url: browsers cannot set headers on a WebSocket


@router.websocket("/ws/{task_id}")
async def watch(
    websocket: WebSocket,
    task_id: str,
    state: CurrentState,
    after: Annotated[str | None, Query()] = None,
    ticket: Annotated[str | None, Query()] = None,
) -> None:
    """The same events as messages: {"type": "progress", "percent", "step", "steps", ...}, then one of
    {"type": "complete", "job"}, {"type": "failed", "error"}, {"type": "cancelled"}.

    ticket: from POST /auth/ticket, for clients that can send neither header nor subprotocol.
    """
    offered = websocket.scope.get("subprotocols", [])
    caller = await authenticate(websocket, state, _offered_key(offered), ticket=ticket)
    job_id, since = parse_job_id(task_id), parse_event_id(after)
    await caller.job_service.get(job_id, caller.owner)
    await websocket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in offered else None)
    # Only a reader sees that the client is gone; Serve does not cancel a socket that only sends.
    reader = asyncio.create_task(_read_until_closed(websocket))
    sender = asyncio.create_task(_send_until_ended(websocket, caller, job_id, since))
    try:
        await asyncio.wait({reader, sender}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        reader.cancel()
        sender.cancel()
        results = await asyncio.gather(reader, sender, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, WebSocketDisconnect):
            raise result


async def _read_until_closed(websocket: WebSocket) -> None:
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
    """The server's own pings keep the connection open meanwhile."""
    try:
        async for event_id, event in caller.job_service.follow(job_id, caller.owner, since):
            body = await event_body(event, caller, job_id)
            message = {"type": _message_type(event), "event_id": event_id, **body}
            await websocket.send_text(json.dumps(message))
    except WeftError as error:  # the store is away for long; the client reconnects with its last id
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


def _offered_key(subprotocols: list[str]) -> bytes | None:
    for offered in subprotocols:
        if offered.startswith(KEY_SUBPROTOCOL):
            text = offered.removeprefix(KEY_SUBPROTOCOL)
            try:
                return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            except (binascii.Error, ValueError):
                return b""
    return None
