"""Work submitted to the engine's thread, and the last items of its events."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from deployments.engine.engine_stats import EngineStats
from deployments.engine.fiber import Fiber, FiberCancelled
from deployments.engine.out_of_memory import is_out_of_memory, shortage
from deployments.engine.scheduled_job import ScheduledJob
from deployments.protocol.errors import (
    BadRequest,
    Internal,
    ModelUnavailable,
    OutOfMemory,
    WeftError,
)
from deployments.protocol.events import Failed, Step

logger = logging.getLogger(__name__)

Emit = Callable[[Any], None]
Work = Callable[[Emit], Any]  # runs as a fiber; emits its progress through the argument


@dataclass(frozen=True, slots=True)
class Finished:
    """The last item of work that did not fail."""

    value: Any  # what the work returned
    queued_s: float
    run_s: float
    unproven: frozenset[str] = frozenset()  # modules whose forwards it shared in sizes not proven exact


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """The worker drains or stops: what `snapshot` returned, or None. Failed follows."""

    state: Any


@dataclass(slots=True, eq=False)
class WorkItem:
    """One submitted piece of work. The worker's thread changes it; asyncio only reads `items`."""

    work: Work
    job: ScheduledJob
    loop: asyncio.AbstractEventLoop
    max_wait_s: float | None
    snapshot: Callable[[], Any] | None
    stats: EngineStats
    context: contextvars.Context  # of the submitter; has the ids for log lines
    items: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    started_at: float = 0.0
    fiber: Fiber | None = None

    def publish(self, item: Any) -> None:
        """Hand the item to the submitter's event loop."""
        with suppress(RuntimeError):  # the caller's loop may be closed by now
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)

    def emit(self, item: Any) -> None:
        """Publish an item of the work itself; its steps are also progress for the scheduler."""
        if isinstance(item, Step):
            self.job.steps_done, self.job.steps = item.step, item.steps
            self.stats.steps += 1
        self.publish(item)


def preempt(submission: WorkItem) -> None:
    """End a request with its checkpoint, if its work has one, and a retryable failure."""
    state = None
    if submission.snapshot is not None and submission.fiber is not None:
        try:
            state = submission.snapshot()
        except Exception:
            logger.exception("a request's state could not be saved; the next replica starts it anew")
    submission.publish(Checkpointed(state))
    reason = ModelUnavailable("the replica is shutting down; the request continues on another replica")
    submission.publish(Failed.of(reason))


def as_weft_error(error: BaseException) -> WeftError:
    """A fiber's error as one of protocol.errors. Diffusers raises ValueError for invalid arguments."""
    if isinstance(error, WeftError):
        return error
    if isinstance(error, FiberCancelled):
        return Internal("the request was cancelled")
    if is_out_of_memory(error):
        logger.warning("the pipeline ran out of memory", exc_info=error)
        return OutOfMemory(
            f"the device ran out of memory{shortage(error)}; ask for fewer pictures or a smaller size"
        )
    if isinstance(error, ValueError | TypeError):
        logger.warning("the pipeline refused its arguments", exc_info=error)
        return BadRequest(f"the pipeline refused the request: {error}")
    logger.error("the pipeline failed", exc_info=error)
    return Internal(f"the pipeline failed: {type(error).__name__}: {error}")
