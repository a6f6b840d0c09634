"""The one thread that owns the device: takes work from asyncio, gives back an async iterator of events."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber, FiberCancelled
from deployments.protocol.errors import BadRequest, Internal, ModelUnavailable, OutOfMemory, WeftError
from deployments.protocol.events import Event, Failed, Queued, Started

logger = logging.getLogger(__name__)

Emit = Callable[[Event], None]
Work = Callable[[Emit], Any]  # runs as a fiber; tells its progress through the argument


@dataclass(frozen=True, slots=True)
class Finished:
    """The fiber's return value; always the last item where nothing failed."""

    value: Any
    queued_s: float
    run_s: float


@dataclass(slots=True, eq=False)
class _Ticket:
    """One submitted piece of work. The worker's thread changes it; asyncio only reads `items`."""

    work: Work
    steps: int
    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[Event | Finished] = field(default_factory=asyncio.Queue)
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float = 0.0
    fiber: Fiber | None = None

    def tell(self, item: Event | Finished) -> None:
        with suppress(RuntimeError):  # the caller's loop may be closed by now
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)


@dataclass(frozen=True, slots=True)
class _Submit:
    ticket: _Ticket


@dataclass(frozen=True, slots=True)
class _Cancel:
    ticket: _Ticket


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class Worker:
    """Runs submitted work as fibers, at most `slots` at once; the rest waits in order of arrival."""

    def __init__(self, engine: Engine, *, slots: int) -> None:
        self._engine = engine
        self._slots = slots
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | _Stop] = queue.SimpleQueue()
        self._waiting: deque[_Ticket] = deque()
        self._running: dict[Fiber, _Ticket] = {}
        self._open = 0  # submitted and not yet ended; counted on the asyncio side
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        """Requests submitted and not yet ended."""
        return self._open

    def check(self) -> None:
        """Raises ModelUnavailable if the thread is dead."""
        if not self._thread.is_alive():
            raise ModelUnavailable("the engine's thread is dead; the replica must be replaced")

    async def submit(self, work: Work, *, steps: int) -> AsyncGenerator[Event | Finished]:
        """Queued, Started, whatever the work emits, then Finished or Failed.

        steps: denoising steps the work will run, told in Started.
        Closing the iterator cancels the work: at once if it waits, else at its parking place.
        """
        self.check()
        if self._stopping:
            raise ModelUnavailable("this replica is shutting down; try again")
        ticket = _Ticket(work, steps, asyncio.get_running_loop())
        ahead = max(0, self._open - self._slots + 1)
        self._open += 1
        self._inbox.put(_Submit(ticket))
        try:
            yield Queued(ahead)
            while True:
                item = await ticket.items.get()
                yield item
                if isinstance(item, Finished | Failed):
                    return
        finally:
            self._open -= 1
            self._inbox.put(_Cancel(ticket))  # without effect on work that is over

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread; whatever still runs fails as retryable."""
        self._stopping = True
        self._inbox.put(_Stop())
        self._thread.join(timeout_s)

    # ---- everything below runs on the worker's thread ----

    def _main(self) -> None:
        try:
            with torch.inference_mode():
                while self._take_orders():
                    self._start_waiting()
                    if not self._engine.idle:
                        self._settle(self._engine.step())
            reason: WeftError = ModelUnavailable("the replica was shut down; try again")
        except BaseException:  # the outermost loop: whatever broke the engine ends this replica
            logger.exception("the engine's thread died")
            reason = ModelUnavailable("the engine failed; the replica is being replaced, try again")
        self._stopping = True
        for ticket in itertools.chain(self._running.values(), self._waiting):
            ticket.tell(Failed.of(reason))

    def _take_orders(self) -> bool:
        """Read the inbox empty, waiting for the first order if there is nothing to do. False: stop."""
        wait = self._engine.idle and not self._waiting
        while True:
            try:
                order = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            match order:
                case _Submit(ticket):
                    self._waiting.append(ticket)
                case _Cancel(ticket):
                    self._cancel(ticket)
                case _Stop():
                    return False

    def _start_waiting(self) -> None:
        while self._waiting and len(self._running) < self._slots:
            ticket = self._waiting.popleft()
            ticket.started_at = time.monotonic()
            ticket.tell(Started(ticket.steps))
            work, tell = ticket.work, ticket.tell
            fiber = Fiber(lambda work=work, tell=tell: work(tell))  # type: ignore[misc]
            ticket.fiber = fiber
            self._running[fiber] = ticket
            self._engine.start(fiber)
            self._settle([fiber])

    def _settle(self, fibers: list[Fiber]) -> None:
        """Tell the outcome of those that are over."""
        for fiber in fibers:
            if not fiber.over:
                continue
            ticket = self._running.pop(fiber)
            if fiber.failure is not None:
                ticket.tell(Failed.of(_explain(fiber.failure)))
                continue
            now = time.monotonic()
            ticket.tell(
                Finished(
                    fiber.result,
                    queued_s=ticket.started_at - ticket.submitted_at,
                    run_s=now - ticket.started_at,
                )
            )

    def _cancel(self, ticket: _Ticket) -> None:
        if ticket.fiber is None:
            with suppress(ValueError):  # it was refused or has been told already
                self._waiting.remove(ticket)
        elif ticket.fiber in self._running:
            self._engine.cancel(ticket.fiber)
            self._settle([ticket.fiber])


def _explain(error: BaseException) -> WeftError:
    """A fiber's error in the words of the tree. Diffusers raises ValueError for arguments it refuses."""
    if isinstance(error, WeftError):
        return error
    if isinstance(error, FiberCancelled):
        return Internal("the request was cancelled")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return OutOfMemory("the device ran out of memory; ask for fewer pictures or a smaller size")
    if isinstance(error, ValueError | TypeError):
        logger.warning("the pipeline refused its arguments", exc_info=error)
        return BadRequest(f"the pipeline refused the request: {error}")
    logger.error("the pipeline failed", exc_info=error)
    return Internal(f"the pipeline failed: {type(error).__name__}: {error}")
