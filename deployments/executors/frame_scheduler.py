"""The frames of a frame-wise video, painted some at a time in any order and given back in theirs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from deployments.protocol.events import Event, Failed, Handover, Queued, Started, Step

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class FrameReady:
    """One finished frame."""

    image: Image


RunFrame = Callable[[int], AsyncGenerator[Any]]  # the events of one frame, the last Painted or Failed


class FrameScheduler:
    """The events of all frames as those of one request: Queued and Started once, every Step, every Painted
    in the order of the frames, or the first Failed. Leaving the block early cancels what is not done.
    """

    def __init__(self, run_frame: RunFrame, count: int, window: int) -> None:
        """window: frames that are painted or wait for an earlier one, at most."""
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
        begun = given = 0
        finished: dict[int, FrameReady] = {}
        seen: set[type] = set()
        while given < self._count:
            while begun < min(self._count, given + self._window):
                self._tasks.add(asyncio.create_task(self._follow(begun)))
                begun += 1
            frame, item = await self._pending_events.get()
            match item:
                case FrameReady():
                    finished[frame] = item
                    while given in finished:
                        yield finished.pop(given)
                        given += 1
                case Queued() | Started():
                    if type(item) not in seen:
                        seen.add(type(item))
                        yield item
                case Handover():
                    yield Handover(0, b"")  # the frames begin anew elsewhere
                case Step():
                    yield item
                case Failed():
                    yield item
                    return
                case BaseException():
                    raise item

    async def _follow(self, frame: int) -> None:
        try:
            async with aclosing(self._run_frame(frame)) as events:
                async for event in events:
                    await self._pending_events.put((frame, event))
        except Exception as error:  # told to whoever reads the events
            await self._pending_events.put((frame, error))
