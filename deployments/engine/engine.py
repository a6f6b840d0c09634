"""The loop: run every fiber to its next parking place, weave the parked calls, forward, deal out, repeat."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch

from deployments.engine.call import ModuleCall, Seam, Unsplittable, split, stack
from deployments.engine.fiber import Fiber, FiberCancelled
from deployments.engine.row_counts import RowCounts
from deployments.engine.step_scheduler import Job, StepScheduler, Waiting
from deployments.engine.stopwatch import Stopwatch
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
        device: torch.device | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """deterministic: only numbers of rows proven to give the same bits (row_counts.py)."""
        self._scheduler = scheduler
        self._now = now
        self._row_counts = RowCounts(scheduler.max_rows, scheduler.allow) if deterministic else None
        self._stopwatch = Stopwatch(scheduler.ran, device or torch.device("cpu"), now)
        self._parked: list[Fiber] = []
        self._waiting: list[Waiting] = []  # what the scheduler knows of each of _parked
        self._noted: set[str] = set()  # seams logged as unknown
        self._alone: set[str] = set()  # seams seen to give outputs without rows
        self._parkings = 0
        self.forwards = 0  # run so far
        self.rows = 0  # pictures in them, all forwards together

    @property
    def idle(self) -> bool:
        return not self._parked

    def start(self, fiber: Fiber) -> None:
        """Run a new fiber to its first parking place; it is over at once if it never parks."""
        fiber.begin()
        self._keep([fiber])

    def cancel(self, fiber: Fiber, error: BaseException | None = None) -> None:
        """End a parked fiber now, by `error` or as cancelled, and again should it park in its clean-up."""
        if fiber not in self._parked:
            return
        index = self._parked.index(fiber)
        del self._parked[index], self._waiting[index]
        while not fiber.over:
            fiber.fail(error or FiberCancelled())

    def step(self) -> list[Fiber]:
        """One forward for the calls that the scheduler picks; returns the fibers that moved on."""
        picked = self._scheduler.pick(self._waiting, self._now())
        chosen = [self._parked[i] for i in picked]
        if len(picked) == len(self._parked):
            self._parked, self._waiting = [], []
        else:
            taken = set(picked)
            self._parked = [fiber for i, fiber in enumerate(self._parked) if i not in taken]
            self._waiting = [waiting for i, waiting in enumerate(self._waiting) if i not in taken]
        self._serve(chosen)
        return chosen

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
        if failure is not None and len(fibers) > 1:
            failure.__traceback__ = None
            self._serve_in_parts(fibers, calls, failure)
            return
        if failure is not None:
            fibers[0].fail(_as_out_of_memory(calls[0], failure) if _is_out_of_memory(failure) else failure)
        else:
            for fiber, output in zip(fibers, outputs, strict=True):
                fiber.resume(output)
        self._keep(fibers)

    def _forward(self, calls: Sequence[ModuleCall], jobs: Sequence[Job]) -> list[object]:
        """One output per call, all from one forward."""
        first = calls[0]
        rows = sum([call.rows for call in calls])
        self.forwards += 1
        self.rows += rows
        self._stopwatch.start()
        if self._row_counts is not None and first.key is not None and first.seam.name not in self._alone:
            outputs, rows = self._row_counts.forward(calls, stack(calls))
        elif len(calls) == 1:
            outputs = [first.run()]
        else:
            outputs = split(first.seam.function(**stack(calls)), [call.rows for call in calls])
        self._stopwatch.stop(first.key, rows, jobs)
        return outputs

    def _serve_in_parts(self, fibers: Sequence[Fiber], calls: Sequence[ModuleCall], error: Exception) -> None:
        """After a failed joint forward: halves if memory ran out, else each alone, so that only the
        guilty call fails."""
        first, rows = calls[0], sum([call.rows for call in calls])
        if _is_out_of_memory(error):
            logger.warning(
                "out of memory, the batch is halved", extra={"seam": first.seam.name, "rows": rows}
            )
            self._scheduler.ran_out_of_memory(first.key, rows)
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
        now = self._now()
        for fiber in fibers:
            call = fiber.call
            if call is None:
                continue
            key = call.key
            if key is None or call.seam.name in self._alone:
                key = None
                self._note_unknown(call.seam)
            self._parkings += 1
            self._parked.append(fiber)
            self._waiting.append(Waiting(key, call.rows, self._parkings, now, fiber.job))

    def _note_unknown(self, seam: Seam) -> None:
        """Say once why a module's calls run alone."""
        if seam.mergeable and seam.name not in self._noted:
            self._noted.add(seam.name)
            logger.info("a call with unknown arguments runs alone", extra={"seam": seam.name})


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
