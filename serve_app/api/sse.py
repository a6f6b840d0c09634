"""Server-sent events: framing, response headers and keep-alive comments."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

from fastapi.sse import EventSourceResponse, format_sse_event

KEEP_ALIVE_S = 15.0
KEEP_ALIVE = format_sse_event(comment="still here")

Item = TypeVar("Item")


def response(stream: AsyncIterator[bytes]) -> EventSourceResponse:
    """The stream as an answer that neither caches nor proxies hold back."""
    return EventSourceResponse(stream, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})


def event(name: str, data: str, event_id: str | None = None) -> bytes:
    """One event on the wire; data: JSON text."""
    return format_sse_event(event=name, data_str=data, id=event_id)


async def with_keep_alives(
    items: AsyncIterator[Item], interval_s: float | None = None
) -> AsyncGenerator[Item | None]:
    """The items, and None whenever none came for interval_s (default: KEEP_ALIVE_S).

    Closes `items` when it is closed. No item is lost to a timeout.
    """
    pending = asyncio.ensure_future(_next(items))
    try:
        while True:
            await asyncio.wait({pending}, timeout=KEEP_ALIVE_S if interval_s is None else interval_s)
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
