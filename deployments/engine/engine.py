"""The loop: run every fiber to its next parking place, weave the parked calls, forward, deal out, repeat."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence

import torch

from deployments.engine.aside import Aside, Outcome
from deployments.engine.call import ModuleCall, Seam, Unsplittable, split, stack
from deployments.engine.fiber import Fiber, FiberCancelled
from deployments.engine.owners import owned
from deployments.engine.row_counts import RowCounts
from deployments.engine.step_scheduler import Job, StepScheduler, Waiting
from deployments.engine.stopwatch import Stopwatch
from deployments.engine.tally import Tally
from deployments.protocol.errors import OutOfMemory

logger = logging.getLogger(__name__)


class Engine:
    """All fibers of one device. Every method runs on the one thread that owns the device, under
    `torch.inference_mode()`: grad mode belongs to the thread, so fibers must never toggle it in turns.
    """

    def __init__(
        self,
        scheduler: StepScheduler,
        *,
        deterministic: bool = False,
        aside: bool = False,
        device: torch.device | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """deterministic: only numbers of rows proven to give the same bits (row_counts.py).

        aside: VAEs run beside the steps of others, in a thread of their own (aside.py).
        """
        device = device or torch.device("cpu")
        self._scheduler = scheduler
        self._now = now
        self._row_counts = RowCounts(scheduler.max_rows, scheduler.allow) if deterministic else None
        self._stopwatch = Stopwatch(self._ran, device, now)
        self.tally = Tally()
        self._parked = _Parked()
        self._aside = Aside(device) if aside else None
        self._parked_aside = _Parked()  # what waits for the place aside
        self._allowed_aside: deque[tuple[Hashable, Sequence[int]]] = deque()  # found there, told here
        self._row_counts_aside = RowCounts(scheduler.max_rows, self._allow_later) if deterministic else None
        self._cancelled_aside: dict[Fiber, BaseException] = {}
        self._noted: set[str] = set()  # seams logged as unknown
        self._alone: set[str] = set()  # seams seen to give outputs without rows
        self._parkings = 0
        self.forwards = 0  # run so far
        self.rows = 0  # pictures in them, all forwards together

    @property
    def idle(self) -> bool:
        return not self._parked.fibers and not self._parked_aside.fibers and self.aside_since is None

    @property
    def aside_since(self) -> float | None:
        """When the forward aside began, by time.monotonic(); None while there is none."""
        return None if self._aside is None else self._aside.since

    def start(self, fiber: Fiber) -> None:
        """Run a new fiber to its first parking place; it is over at once if it never parks."""
        fiber.begin()
        self._keep([fiber])

    def cancel(self, fiber: Fiber, error: BaseException | None = None) -> None:
        """End a parked fiber now, by `error` or as cancelled, and again should it park in its clean-up.

        One whose call is computed aside ends when that is done.
        """
        error = error or FiberCancelled()
        if self._aside is not None and self._aside.has(fiber):
            self._cancelled_aside[fiber] = error
        elif self._parked.remove(fiber) or self._parked_aside.remove(fiber):
            _end(fiber, error)

    def step(self) -> list[Fiber]:
        """One forward for the calls that the scheduler picks, and what came from aside meanwhile; returns
        the fibers that moved on."""
        moved = [] if self._aside is None else self._look_aside(self._aside)
        if self._parked.fibers:
            picked = self._scheduler.pick(self._parked.waiting, self._now())
            chosen = self._parked.take(picked)
            self._serve(chosen)
            moved += chosen
        return moved

    def close(self) -> None:
        """End the thread aside."""
        if self._aside is not None:
            self._aside.close()

    def _look_aside(self, aside: Aside) -> list[Fiber]:
        """Take what was computed aside, waiting for it if there is nothing else to do; give the next."""
        moved: list[Fiber] = []
        outcome = aside.take(patiently=not self._parked.fibers)
        if outcome is not None:
            moved = self._take(outcome)
        if aside.free and self._parked_aside.fibers:
            waiting = self._parked_aside.waiting
            fibers = self._parked_aside.take(self._scheduler.pick(waiting, self._now(), look=False))
            calls = [fiber.call for fiber in fibers if fiber.call is not None]
            self._count(calls)
            row_counts = self._row_counts_aside if self._may_join(calls[0]) else None
            aside.give(fibers, lambda: _compute(calls, row_counts))
        return moved

    def _allow_later(self, key: Hashable, row_counts: Sequence[int]) -> None:
        """Called in the thread aside."""
        self._allowed_aside.append((key, row_counts))

    def _take(self, outcome: Outcome) -> list[Fiber]:
        """Deal out what was computed aside."""
        while self._allowed_aside:
            self._scheduler.allow(*self._allowed_aside.popleft())
        fibers = [fiber for fiber in outcome.fibers if fiber not in self._cancelled_aside]
        calls = [fiber.call for fiber in outcome.fibers if fiber.call is not None]
        if outcome.failure is None:
            jobs = [fiber.job for fiber in outcome.fibers]
            self._ran(calls[0].seam.name, calls[0].key, outcome.rows, outcome.seconds, jobs, self._now())
        dealt = dict(zip(outcome.fibers, outcome.outputs, strict=True)) if outcome.outputs else {}
        for fiber in outcome.fibers:
            if (error := self._cancelled_aside.pop(fiber, None)) is not None:
                _end(fiber, error)
        self._deal(fibers, [dealt[fiber] for fiber in fibers if fiber in dealt], outcome.failure)
        return list(outcome.fibers)

    def _serve(self, fibers: Sequence[Fiber]) -> None:
        """Give each fiber the output of its call, or the error that the call alone would raise."""
        calls = [fiber.call for fiber in fibers if fiber.call is not None]  # all of them: they are parked
        outputs: list[object] = []
        failure: Exception | None = None
        try:
            outputs = self._forward(calls, [fiber.job for fiber in fibers])
        except Exception as error:
            failure = error
        # handled outside of the except block, whose traceback would keep the failed forward's tensors
        self._deal(fibers, outputs, failure)

    def _deal(self, fibers: Sequence[Fiber], outputs: Sequence[object], failure: Exception | None) -> None:
        """Resume each fiber with its output; after a failure, find out whose it is."""
        if failure is not None and len(fibers) > 1:
            failure.__traceback__ = None
            self._serve_in_parts(fibers, failure)
            return
        for index, fiber in enumerate(fibers):
            if failure is None:
                fiber.resume(outputs[index])
            elif _is_out_of_memory(failure) and fiber.call is not None:
                fiber.fail(_as_out_of_memory(fiber.call, failure))
            else:
                fiber.fail(failure)
        self._keep(fibers)

    def _forward(self, calls: Sequence[ModuleCall], jobs: Sequence[Job]) -> list[object]:
        """One output per call, all from one forward."""
        self._count(calls)
        self._stopwatch.start()
        outputs, rows = _compute(calls, self._row_counts if self._may_join(calls[0]) else None)
        self._stopwatch.stop(calls[0].seam.name, calls[0].key, rows, jobs)
        return outputs

    def _ran(
        self, module: str, key: Hashable, rows: int, seconds: float, jobs: Sequence[Job], now: float
    ) -> None:
        self._scheduler.ran(key, rows, seconds, jobs, now)
        self.tally.ran(module, jobs[0].labels, rows, seconds)

    def _count(self, calls: Sequence[ModuleCall]) -> None:
        self.forwards += 1
        self.rows += sum([call.rows for call in calls])

    def _may_join(self, call: ModuleCall) -> bool:
        return call.key is not None and call.seam.name not in self._alone

    def _serve_in_parts(self, fibers: Sequence[Fiber], error: Exception) -> None:
        """After a failed joint forward: halves if memory ran out, else each alone, so that only the
        guilty call fails."""
        calls = [fiber.call for fiber in fibers if fiber.call is not None]
        first, rows = calls[0], sum([call.rows for call in calls])
        if _is_out_of_memory(error):
            logger.warning(
                "out of memory, the batch is halved", extra={"seam": first.seam.name, "rows": rows}
            )
            self._scheduler.ran_out_of_memory(first.key, rows)
            self.tally.halved += 1
            _free_device_memory()
            middle = (len(fibers) + 1) // 2
            parts: Sequence[Sequence[Fiber]] = (fibers[:middle], fibers[middle:])
        else:
            if isinstance(error, Unsplittable):
                self._alone.add(first.seam.name)
            logger.warning(
                "a joint forward failed, its calls run alone",
                extra={"seam": first.seam.name, "rows": rows, "error": repr(error)},
            )
            parts = [[fiber] for fiber in fibers]
        for part in parts:
            self._serve(part)

    def _keep(self, fibers: Sequence[Fiber]) -> None:
        """Note what these fibers have just parked for; one that is over is let go."""
        for fiber in fibers:
            call = fiber.call
            if call is None:
                continue
            key = call.key
            if key is None or call.seam.name in self._alone:
                key = None
                self._note_unknown(call.seam)
            self._parkings += 1
            place = self._parked_aside if call.seam.aside and self._aside is not None else self._parked
            place.add(fiber, Waiting(key, call.rows, self._parkings, fiber.job))

    def _note_unknown(self, seam: Seam) -> None:
        """Say once why a module's calls run alone."""
        if seam.mergeable and seam.name not in self._noted:
            self._noted.add(seam.name)
            logger.info("a call with unknown arguments runs alone", extra={"seam": seam.name})


class _Parked:
    """Parked fibers, and what the scheduler knows of each."""

    def __init__(self) -> None:
        self.fibers: list[Fiber] = []
        self.waiting: list[Waiting] = []

    def add(self, fiber: Fiber, waiting: Waiting) -> None:
        self.fibers.append(fiber)
        self.waiting.append(waiting)

    def remove(self, fiber: Fiber) -> bool:
        """Whether it was here."""
        if fiber not in self.fibers:
            return False
        index = self.fibers.index(fiber)
        del self.fibers[index], self.waiting[index]
        return True

    def take(self, picked: Sequence[int]) -> list[Fiber]:
        """Remove the fibers at these indices, in the order given."""
        chosen = [self.fibers[i] for i in picked]
        if len(picked) == len(self.fibers):
            self.fibers, self.waiting = [], []
        else:
            taken = set(picked)
            self.fibers = [fiber for i, fiber in enumerate(self.fibers) if i not in taken]
            self.waiting = [waiting for i, waiting in enumerate(self.waiting) if i not in taken]
        return chosen


def _compute(calls: Sequence[ModuleCall], row_counts: RowCounts | None) -> tuple[list[object], int]:
    """One output per call, all from one forward, and the rows that ran. row_counts: keep to these."""
    first = calls[0]
    if row_counts is not None:
        return row_counts.forward(calls, stack(calls))
    rows, owners = [call.rows for call in calls], [call.owner for call in calls]
    if len(calls) == 1:
        return [owned(owners, rows, first.run)], rows[0]
    return split(owned(owners, rows, lambda: first.seam.function(**stack(calls))), rows), sum(rows)


def _end(fiber: Fiber, error: BaseException) -> None:
    while not fiber.over:
        fiber.fail(error)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # the CPU's words


def _as_out_of_memory(call: ModuleCall, error: Exception) -> OutOfMemory:
    _free_device_memory()
    wrapped = OutOfMemory(
        f"the device ran out of memory in {call.seam.name} with {call.rows} rows; "
        "ask for fewer pictures or a smaller size"
    )
    wrapped.__cause__ = error
    return wrapped


def _free_device_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
