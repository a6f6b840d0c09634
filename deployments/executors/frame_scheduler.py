"""Runs the frames of a frame-wise video some at a time, in any order, and delivers them in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from PIL.Image import Image

from deployments.protocol.events import Event, Failed, Handover, Queued, Started, Step


@dataclass(frozen=True, slots=True)
class FrameReady:
    """One finished frame."""

    image: Image
    unproven: frozenset[str] = frozenset()  # see Finished


RunFrame = Callable[[int], AsyncGenerator[Any]]  # the events of one frame, the last FrameReady or Failed


class FrameScheduler:
    """The events of all frames as those of one request: Queued and Started once, every Step, every
    FrameReady in the order of the frames, or the first Failed. Leaving the block early cancels the rest.
    """

    def __init__(self, run_frame: RunFrame, count: int, window: int) -> None:
        """window: most frames that run or wait for an earlier one."""
        self._run_frame = run_frame
        self._count = count
        self._window = window
        self._pending_events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> AsyncIterator[Event | FrameReady]:
        return self._events()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _events(self) -> AsyncIterator[Event | FrameReady]:
        delivered = 0  # frames
        ready: dict[int, FrameReady] = {}  # by frame; these wait for an earlier one
        seen: set[type] = set()
        while delivered < self._count:
            self._start_frames(delivered + self._window)
            frame, item = await self._pending_events.get()
            match item:
                case FrameReady():
                    ready[frame] = item
                    while delivered in ready:
                        yield ready.pop(delivered)
                        delivered += 1
                case Queued() | Started():
                    if type(item) not in seen:
                        seen.add(type(item))
                        yield item
                case Handover():
                    yield Handover(0, b"")  # another replica starts with the first frame again
                case Step():
                    yield item
                case Failed():
                    yield item
                    return
                case BaseException():
                    raise item

    def _start_frames(self, end: int) -> None:
        """Start every frame before `end` that has not been started."""
        for frame in range(len(self._tasks), min(self._count, end)):
            self._tasks.add(asyncio.create_task(self._forward_events(frame)))

    async def _forward_events(self, frame: int) -> None:
        try:
            async with aclosing(self._run_frame(frame)) as events:
                async for event in events:
                    await self._pending_events.put((frame, event))
        except Exception as error:  # raised again by _events
            await self._pending_events.put((frame, error))
