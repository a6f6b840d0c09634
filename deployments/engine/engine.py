"""The loop: run every fiber to its next parking place, weave the parked calls, forward, deal out, repeat."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from deployments.engine.call import ModuleCall, Unsplittable, split, stack
from deployments.engine.fiber import Fiber, FiberCancelled
from deployments.engine.step_scheduler import StepScheduler, Waiting
from deployments.protocol.errors import OutOfMemory

logger = logging.getLogger(__name__)


class Engine:
    """All fibers of one device. Every method runs on the one thread that owns the device, under
    `torch.inference_mode()`: grad mode belongs to the thread, so fibers must never toggle it in turns.
    """

    def __init__(self, scheduler: StepScheduler) -> None:
        self._scheduler = scheduler
        self._parked: list[Fiber] = []
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
        self._keep(fiber)

    def cancel(self, fiber: Fiber) -> None:
        """End a parked fiber now. One that parks again while it cleans up is ended there too."""
        if fiber not in self._parked:
            return
        self._parked.remove(fiber)
        while not fiber.over:
            fiber.fail(FiberCancelled())

    def step(self) -> list[Fiber]:
        """One forward for the calls that the scheduler picks; returns the fibers that moved on."""
        parked = self._parked
        picked = self._scheduler.pick([_as_waiting(fiber, self._alone) for fiber in parked])
        chosen = [parked[i] for i in picked]
        for fiber in chosen:
            parked.remove(fiber)
        self._serve(chosen)
        return chosen

    def _serve(self, fibers: Sequence[Fiber]) -> None:
        """Give each fiber the output of its call, or the error that the call alone would raise."""
        calls = [_call_of(fiber) for fiber in fibers]
        outputs: list[object] = []
        failure: Exception | None = None
        try:
            outputs = self._forward(calls)
        except Exception as error:
            failure = error
        # handled outside of the except block, whose traceback would keep the failed forward's tensors
        if failure is not None and len(fibers) > 1:
            failure.__traceback__ = None
            self._serve_in_parts(fibers, calls, failure)
            return
        if failure is not None:
            fibers[0].fail(_as_out_of_memory(calls[0], failure) if _is_out_of_memory(failure) else failure)
            self._keep(fibers[0])
            return
        for fiber, output in zip(fibers, outputs, strict=True):
            fiber.resume(output)
            self._keep(fiber)

    def _forward(self, calls: Sequence[ModuleCall]) -> list[object]:
        """One output per call, all from one forward."""
        self.forwards += 1
        self.rows += sum(call.rows for call in calls)
        if len(calls) == 1:
            return [calls[0].run()]
        output = calls[0].seam.function(**stack(calls))
        return split(output, [call.rows for call in calls])

    def _serve_in_parts(self, fibers: Sequence[Fiber], calls: Sequence[ModuleCall], error: Exception) -> None:
        """After a failed joint forward: halves if memory ran out, else each alone, so that only the
        guilty call fails."""
        first, rows = calls[0], sum(call.rows for call in calls)
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

    def _keep(self, fiber: Fiber) -> None:
        if fiber.over:
            return
        self._parkings += 1
        fiber.parked_at = self._parkings
        self._parked.append(fiber)
        call = _call_of(fiber)
        if call.key is None and call.seam.mergeable and call.seam.name not in self._noted:
            self._noted.add(call.seam.name)
            logger.info("a call with unknown arguments runs alone", extra={"seam": call.seam.name})


def _as_waiting(fiber: Fiber, alone: set[str]) -> Waiting:
    call = _call_of(fiber)
    return Waiting(None if call.seam.name in alone else call.key, call.rows, fiber.parked_at)


def _call_of(fiber: Fiber) -> ModuleCall:
    assert fiber.call is not None, "a parked fiber waits for a call"
    return fiber.call


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
