"""The loop: run every fiber to its next parking place, weave the parked calls, forward, deal out, repeat."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence

import torch

from deployments.engine.auxiliary_lane import AuxiliaryLane, ForwardOutcome
from deployments.engine.batch_buckets import BucketProver
from deployments.engine.call import ModuleCall, Seam
from deployments.engine.engine_stats import EngineStats
from deployments.engine.fiber import Fiber, FiberCancelled
from deployments.engine.forward_timer import ForwardTimer
from deployments.engine.lora_rows import run_with_lora_rows
from deployments.engine.stacking import Unsplittable, split, stack
from deployments.engine.step_scheduler import ParkedCall, ScheduledJob, StepScheduler
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
        auxiliary_lane: bool = False,
        device: torch.device | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """deterministic: only numbers of rows proven to give the same bits (batch_buckets.py).

        aside: VAEs run beside the steps of others, in a thread of their own (auxiliary_lane.py).
        """
        device = device or torch.device("cpu")
        self._scheduler = scheduler
        self._now = now
        self._bucket_prover = (
            BucketProver(scheduler.max_batch_size, scheduler.set_buckets) if deterministic else None
        )
        self._stopwatch = ForwardTimer(self._record_forward, device, now)
        self.stats = EngineStats()
        self._parked = _ParkedFibers()
        self._auxiliary_lane = AuxiliaryLane(device) if auxiliary_lane else None
        self._parked_auxiliary = _ParkedFibers()  # what waits for the place aside
        self._auxiliary_buckets: deque[tuple[Hashable, Sequence[int]]] = deque()  # found there, told here
        self._auxiliary_prover = (
            BucketProver(scheduler.max_batch_size, self._set_buckets_later) if deterministic else None
        )
        self._cancelled_auxiliary: dict[Fiber, BaseException] = {}
        self._logged_seams: set[str] = set()  # seams logged as unknown
        self._unsplittable_seams: set[str] = set()  # seams seen to give outputs without rows
        self._parkings = 0
        self.forwards = 0  # run so far
        self.rows = 0  # pictures in them, all forwards together

    @property
    def idle(self) -> bool:
        return (
            not self._parked.fibers
            and not self._parked_auxiliary.fibers
            and self.auxiliary_busy_since is None
        )

    @property
    def auxiliary_busy_since(self) -> float | None:
        """When the forward aside began, by time.monotonic(); None while there is none."""
        return None if self._auxiliary_lane is None else self._auxiliary_lane.busy_since

    def start(self, fiber: Fiber) -> None:
        """Run a new fiber to its first parking place; it is over at once if it never parks."""
        fiber.begin()
        self._park([fiber])

    def cancel(self, fiber: Fiber, error: BaseException | None = None) -> None:
        """End a parked fiber now, by `error` or as cancelled, and again should it park in its clean-up.

        One whose call is computed aside ends when that is done.
        """
        error = error or FiberCancelled()
        if self._auxiliary_lane is not None and self._auxiliary_lane.is_running(fiber):
            self._cancelled_auxiliary[fiber] = error
        elif self._parked.remove(fiber) or self._parked_auxiliary.remove(fiber):
            _end(fiber, error)

    def step(self) -> list[Fiber]:
        """One forward for the calls that the scheduler picks, and what came from aside meanwhile; returns
        the fibers that moved on."""
        moved = [] if self._auxiliary_lane is None else self._step_auxiliary(self._auxiliary_lane)
        if self._parked.fibers:
            picked = self._scheduler.pick(self._parked.waiting, self._now())
            chosen = self._parked.take(picked)
            self._run_forward(chosen)
            moved += chosen
        return moved

    def close(self) -> None:
        """End the thread aside."""
        if self._auxiliary_lane is not None:
            self._auxiliary_lane.close()

    def _step_auxiliary(self, auxiliary_lane: AuxiliaryLane) -> list[Fiber]:
        """Take what was computed aside, waiting for it if there is nothing else to do; give the next."""
        moved: list[Fiber] = []
        outcome = auxiliary_lane.collect(block=not self._parked.fibers)
        if outcome is not None:
            moved = self._take(outcome)
        if auxiliary_lane.is_free and self._parked_auxiliary.fibers:
            waiting = self._parked_auxiliary.waiting
            fibers = self._parked_auxiliary.take(self._scheduler.pick(waiting, self._now(), observe=False))
            calls = [fiber.call for fiber in fibers if fiber.call is not None]
            self._count(calls)
            buckets = self._auxiliary_prover if self._may_join(calls[0]) else None
            auxiliary_lane.submit(fibers, lambda: _compute(calls, buckets))
        return moved

    def _set_buckets_later(self, key: Hashable, buckets: Sequence[int]) -> None:
        """Called in the thread aside."""
        self._auxiliary_buckets.append((key, buckets))

    def _take(self, outcome: ForwardOutcome) -> list[Fiber]:
        """Deal out what was computed aside."""
        while self._auxiliary_buckets:
            self._scheduler.set_buckets(*self._auxiliary_buckets.popleft())
        fibers = [fiber for fiber in outcome.fibers if fiber not in self._cancelled_auxiliary]
        calls = [fiber.call for fiber in outcome.fibers if fiber.call is not None]
        if outcome.failure is None:
            jobs = [fiber.job for fiber in outcome.fibers]
            self._record_forward(
                calls[0].seam.name, calls[0].key, outcome.batch_size, outcome.seconds, jobs, self._now()
            )
        dealt = dict(zip(outcome.fibers, outcome.outputs, strict=True)) if outcome.outputs else {}
        for fiber in outcome.fibers:
            if (error := self._cancelled_auxiliary.pop(fiber, None)) is not None:
                _end(fiber, error)
        self._resume_all(fibers, [dealt[fiber] for fiber in fibers if fiber in dealt], outcome.failure)
        return list(outcome.fibers)

    def _run_forward(self, fibers: Sequence[Fiber]) -> None:
        """Give each fiber the output of its call, or the error that the call alone would raise."""
        calls = [fiber.call for fiber in fibers if fiber.call is not None]  # all of them: they are parked
        outputs: list[object] = []
        failure: Exception | None = None
        try:
            outputs = self._forward(calls, [fiber.job for fiber in fibers])
        except Exception as error:
            failure = error
        # handled outside of the except block, whose traceback would keep the failed forward's tensors
        self._resume_all(fibers, outputs, failure)

    def _resume_all(
        self, fibers: Sequence[Fiber], outputs: Sequence[object], failure: Exception | None
    ) -> None:
        """Resume each fiber with its output; after a failure, find out whose it is."""
        if failure is not None and len(fibers) > 1:
            failure.__traceback__ = None
            self._retry_in_parts(fibers, failure)
            return
        for index, fiber in enumerate(fibers):
            if failure is None:
                fiber.resume(outputs[index])
            elif _is_out_of_memory(failure) and fiber.call is not None:
                fiber.fail(_as_out_of_memory(fiber.call, failure))
            else:
                fiber.fail(failure)
        self._park(fibers)

    def _forward(self, calls: Sequence[ModuleCall], jobs: Sequence[ScheduledJob]) -> list[object]:
        """One output per call, all from one forward."""
        self._count(calls)
        self._stopwatch.start()
        outputs, batch_size = _compute(calls, self._bucket_prover if self._may_join(calls[0]) else None)
        self._stopwatch.stop(calls[0].seam.name, calls[0].key, batch_size, jobs)
        return outputs

    def _record_forward(
        self,
        module: str,
        key: Hashable,
        batch_size: int,
        seconds: float,
        jobs: Sequence[ScheduledJob],
        now: float,
    ) -> None:
        self._scheduler.record_forward(key, batch_size, seconds, jobs, now)
        self.stats.record_forward(module, jobs[0].labels, batch_size, seconds)

    def _count(self, calls: Sequence[ModuleCall]) -> None:
        self.forwards += 1
        self.rows += sum([call.batch_size for call in calls])

    def _may_join(self, call: ModuleCall) -> bool:
        return call.key is not None and call.seam.name not in self._unsplittable_seams

    def _retry_in_parts(self, fibers: Sequence[Fiber], error: Exception) -> None:
        """After a failed joint forward: halves if memory ran out, else each alone, so that only the
        guilty call fails."""
        calls = [fiber.call for fiber in fibers if fiber.call is not None]
        first, batch_size = calls[0], sum([call.batch_size for call in calls])
        if _is_out_of_memory(error):
            logger.warning(
                "out of memory, the batch is halved", extra={"seam": first.seam.name, "rows": batch_size}
            )
            self._scheduler.record_out_of_memory(first.key, batch_size)
            self.stats.halved_batches += 1
            _free_device_memory()
            middle = (len(fibers) + 1) // 2
            parts: Sequence[Sequence[Fiber]] = (fibers[:middle], fibers[middle:])
        else:
            if isinstance(error, Unsplittable):
                self._unsplittable_seams.add(first.seam.name)
            logger.warning(
                "a joint forward failed, its calls run alone",
                extra={"seam": first.seam.name, "rows": batch_size, "error": repr(error)},
            )
            parts = [[fiber] for fiber in fibers]
        for part in parts:
            self._run_forward(part)

    def _park(self, fibers: Sequence[Fiber]) -> None:
        """Note what these fibers have just parked for; one that is over is let go."""
        for fiber in fibers:
            call = fiber.call
            if call is None:
                continue
            key = call.key
            if key is None or call.seam.name in self._unsplittable_seams:
                key = None
                self._log_unknown_arguments(call.seam)
            self._parkings += 1
            place = (
                self._parked_auxiliary
                if call.seam.auxiliary and self._auxiliary_lane is not None
                else self._parked
            )
            place.add(fiber, ParkedCall(key, call.batch_size, self._parkings, fiber.job))

    def _log_unknown_arguments(self, seam: Seam) -> None:
        """Say once why a module's calls run alone."""
        if seam.mergeable and seam.name not in self._logged_seams:
            self._logged_seams.add(seam.name)
            logger.info("a call with unknown arguments runs alone", extra={"seam": seam.name})


class _ParkedFibers:
    """Parked fibers, and what the scheduler knows of each."""

    def __init__(self) -> None:
        self.fibers: list[Fiber] = []
        self.waiting: list[ParkedCall] = []

    def add(self, fiber: Fiber, waiting: ParkedCall) -> None:
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


def _compute(calls: Sequence[ModuleCall], buckets: BucketProver | None) -> tuple[list[object], int]:
    """One output per call, all from one forward, and the rows that ran. row_counts: keep to these."""
    first = calls[0]
    if buckets is not None:
        return buckets.forward(calls, stack(calls))
    batch_size, lora_sets = [call.batch_size for call in calls], [call.lora_set for call in calls]
    if len(calls) == 1:
        return [run_with_lora_rows(lora_sets, batch_size, first.run)], batch_size[0]
    return split(
        run_with_lora_rows(lora_sets, batch_size, lambda: first.seam.function(**stack(calls))), batch_size
    ), sum(batch_size)


def _end(fiber: Fiber, error: BaseException) -> None:
    while not fiber.done:
        fiber.fail(error)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # the CPU's words


def _as_out_of_memory(call: ModuleCall, error: Exception) -> OutOfMemory:
    _free_device_memory()
    wrapped = OutOfMemory(
        f"the device ran out of memory in {call.seam.name} with {call.batch_size} rows; "
        "ask for fewer pictures or a smaller size"
    )
    wrapped.__cause__ = error
    return wrapped


def _free_device_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
