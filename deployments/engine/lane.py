"""A lane: parked calls, whose forwards run one after the other for the calls that the scheduler picks."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence

from deployments.engine.batch_buckets import BucketProver
from deployments.engine.call import ModuleCall, Seam
from deployments.engine.device_errors import DeviceBroken, is_device_broken
from deployments.engine.engine_stats import EngineStats
from deployments.engine.fiber import Fiber
from deployments.engine.forward_runner import Forward, ForwardRunner
from deployments.engine.memory_meter import MemoryMeter
from deployments.engine.out_of_memory import as_out_of_memory, free_device_memory, is_out_of_memory
from deployments.engine.proof_state import ProofState
from deployments.engine.scheduled_job import ParkedCall
from deployments.engine.stacking import Unsplittable
from deployments.engine.step_scheduler import StepScheduler
from deployments.protocol.request import Exactness

TRIAL_SHARE = 2  # while requests wait, trials compute at most one row for so many of theirs

logger = logging.getLogger(__name__)


class Lane:
    """Parked fibers, and the forwards for their calls. All methods run on the engine's thread."""

    def __init__(
        self,
        scheduler: StepScheduler,
        runner: ForwardRunner,
        stats: EngineStats,
        park: Callable[[Sequence[Fiber]], None],
        *,
        exact: Exactness,
        observes_backlog: bool,
        run_by_itself: Callable[[Fiber], bool] = lambda _fiber: False,
        meter: MemoryMeter | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """park: takes fibers that have been resumed, to the lane of their next call.

        exact: of requests without a policy of their own; "off": no batch size is proven (batch_buckets.py).
        observes_backlog: the scheduler may learn from this lane's calls how much work waits.
        run_by_itself: takes a fiber whose call did not fit beside the forward of another lane; False: there
        was none.
        meter: measures the device's memory that trials of batch sizes take.
        """
        self._scheduler = scheduler
        self._runner = runner
        self._stats = stats
        self._park = park
        self._run_by_itself = run_by_itself
        self._observes_backlog = observes_backlog
        self._now = now
        self._prover: BucketProver | None = None
        if exact != "off":
            self._prover = BucketProver(scheduler.max_batch_size, exact, scheduler.row_limit, meter)
        self._fibers: list[Fiber] = []
        self._calls: list[ParkedCall] = []  # of these fibers, for the scheduler
        self._parked = 0  # so far
        self._in_flight: Sequence[Fiber] = ()
        # parts of failed joint forwards, which run next, one per step: commands are heard between them
        self._retries: deque[list[Fiber]] = deque()
        self._cancelled: dict[Fiber, BaseException] = {}  # of those in flight
        self._unsplittable: set[str] = set()  # seams whose outputs have no rows
        self._logged: set[str] = set()  # seams logged for unknown arguments
        self.forwards = 0  # so far
        self.rows = 0  # of these forwards together, without padding
        self._trial_rows = 0  # of the prover's forwards while calls waited
        self._holding: Seam | None = None  # keeps something on the device for its next forward

    @property
    def waiting(self) -> bool:
        """Whether calls wait for a forward."""
        return bool(self._fibers or self._retries)

    @property
    def idle(self) -> bool:
        """Whether no call waits and no forward runs."""
        return not self._fibers and not self._retries and not self._runner.busy

    @property
    def busy(self) -> bool:
        """Whether a forward is in flight."""
        return self._runner.busy

    @property
    def busy_since(self) -> float | None:
        """time.monotonic() when the forward on another thread began; None if there is none."""
        return self._runner.busy_since

    def add(self, fiber: Fiber, call: ModuleCall) -> None:
        """Take a fiber that has parked for this call."""
        key = call.key
        if key is None or call.seam.name in self._unsplittable:
            key = None
            self._log_unknown_arguments(call.seam)
        self._parked += 1
        self._fibers.append(fiber)
        sizes = None if key is None or self._prover is None else self._prover.sizes(call)
        self._calls.append(ParkedCall(key, call.batch_size, self._parked, fiber.job, sizes))

    def cancel(self, fiber: Fiber, error: BaseException) -> bool:
        """End a fiber of this lane, now or when its forward is done. False: it is not on this lane."""
        if fiber in self._in_flight:
            self._cancelled[fiber] = error
        elif fiber in self._fibers:
            index = self._fibers.index(fiber)
            del self._fibers[index], self._calls[index]
            fiber.end(error)
        else:
            part = next((part for part in self._retries if fiber in part), None)
            if part is None:
                return False
            part.remove(fiber)
            if not part:
                self._retries.remove(part)
            fiber.end(error)
        return True

    def step(self) -> list[Fiber]:
        """Finish the forward in flight if it is done and start the next. Returns the fibers that moved on."""
        moved = self.finish(block=False)
        if self.waiting and not self._runner.busy:
            self._launch(self._retries.popleft() if self._retries else self._pick())
            if self._fibers and self._prover is not None:
                self._try_batch_size(self._prover)
            moved += self.finish(block=False)
        return moved

    def finish(self, *, block: bool) -> list[Fiber]:
        """Resume the fibers of the forward in flight if it is done; after a failure, find out whose it is.
        Returns those that moved on.

        block: wait for it. Raises DeviceBroken when the device failed and not a call: none of its calls could
        succeed alone.
        """
        forward = self._runner.collect(block=block) if self._in_flight else None
        if forward is None:
            return []
        moved = self._settle(forward)
        if self._holding is not None and not self._waits_for(self._holding):
            self._release()
        return moved

    def run_now(self, fiber: Fiber) -> list[Fiber]:
        """One forward for the parked call of a fiber of no lane; returns the fiber when it has moved on."""
        self._launch([fiber])
        return self.finish(block=True)

    def forget(self, seams: Collection[Seam]) -> None:
        """Keep nothing of these seams, whose modules are going to be freed. None of their calls waits."""
        if self._holding in seams:
            self._release()
        if self._prover is not None:
            self._prover.forget(seams)

    def run_trial(self, *, before_traffic: bool = False) -> bool:
        """Run one forward of the prover's trials; False if there is nothing to try."""
        if self._prover is None or (seam := self._prover.seam_to_run()) is None:
            return False
        self._hold(seam)
        self._prover.run_trial(before_traffic=before_traffic)
        if self._prover.seam_to_run() is not seam:
            self._release()
        return True

    @property
    def has_trials(self) -> bool:
        """Whether the prover has batch sizes to try."""
        return self._prover is not None and self._prover.rows_to_run() is not None

    def proofs(self) -> list[ProofState]:
        """What is known of batch sizes; may be called from any thread."""
        return [] if self._prover is None else self._prover.states()

    def close(self) -> None:
        """End the runner's thread after the forward in flight."""
        self._runner.close()

    def _hold(self, seam: Seam) -> None:
        """A forward of this seam is next; nothing of another one stays on the device beside it."""
        if self._holding is not seam:
            self._release()
        if seam.release is not None:
            self._holding = seam

    def _waits_for(self, seam: Seam) -> bool:
        return any(fiber.call is not None and fiber.call.seam is seam for fiber in self._fibers)

    def _release(self) -> None:
        held, self._holding = self._holding, None
        if held is not None and held.release is not None:
            held.release()

    def _pick(self) -> list[Fiber]:
        return self._take(self._scheduler.pick(self._calls, self._now(), observe=self._observes_backlog))

    def _try_batch_size(self, prover: BucketProver) -> None:
        """While calls wait for others: trials, for at most one row per TRIAL_SHARE rows of requests."""
        wanted, self._scheduler.wanted = self._scheduler.wanted, None
        if wanted is not None:
            prover.want(*wanted)
        if self._trial_rows * TRIAL_SHARE < self.rows and not self._runner.busy:
            self._trial_rows += prover.rows_to_run() or 0
            self.run_trial()

    def _take(self, picked: Sequence[int]) -> list[Fiber]:
        """Remove the fibers at these indices. They keep the order of the indices, but those of one LoRA set
        are side by side: its products are computed once for all rows that are."""
        chosen = [self._fibers[i] for i in picked]
        if len({fiber.lora_set for fiber in chosen}) > 1:
            chosen.sort(key=lambda fiber: id(fiber.lora_set))
        if len(picked) == len(self._fibers):
            self._fibers, self._calls = [], []
        else:
            taken = set(picked)
            self._fibers = [fiber for i, fiber in enumerate(self._fibers) if i not in taken]
            self._calls = [call for i, call in enumerate(self._calls) if i not in taken]
        return chosen

    def _launch(self, fibers: Sequence[Fiber]) -> None:
        """Start one forward for the calls of these fibers."""
        calls = [fiber.call for fiber in fibers if fiber.call is not None]  # all of them: they are parked
        first = calls[0]
        self.forwards += 1
        self.rows += sum([call.batch_size for call in calls])
        prover = self._prover
        if first.key is None or first.seam.name in self._unsplittable:
            prover = None
        self._in_flight = fibers
        self._hold(first.seam)
        self._runner.submit(Forward(fibers, calls, prover))

    def _settle(self, forward: Forward) -> list[Fiber]:
        """Resume the fibers of a forward with its outputs or its failure."""
        if forward.failure is not None and is_device_broken(forward.failure):
            raise DeviceBroken(forward.fibers) from forward.failure
        self._in_flight = ()
        moved = list(forward.fibers)
        if self._cancelled:
            self._end_cancelled(forward)
        fibers, failure = forward.fibers, forward.failure
        if failure is not None and len(fibers) > 1:
            failure.__traceback__ = None  # it would keep the failed forward's tensors
            self._retries.extendleft(reversed(self._parts_of(fibers, failure)))
        elif failure is not None:
            if fibers and is_out_of_memory(failure) and self._run_by_itself(fibers[0]):
                return []
            _fail(fibers, failure)
            self._park(fibers)
        else:
            if forward.unproven and len(forward.calls) > 1:
                self._note_unproven(forward)
            for fiber, output in zip(fibers, forward.outputs, strict=True):
                fiber.resume(output)
            self._park(fibers)
        return moved

    def _note_unproven(self, forward: Forward) -> None:
        """Remember for the requests of these calls that their bits may depend on each other."""
        name = forward.calls[0].seam.name
        self._stats.unproven_forwards += 1
        for fiber in forward.fibers:
            if fiber.call in forward.unproven and name not in fiber.unproven:
                fiber.unproven |= {name}

    def _end_cancelled(self, forward: Forward) -> None:
        """End the fibers that were cancelled during the forward, and take them out of it."""
        cancelled, self._cancelled = self._cancelled, {}
        kept = [i for i, fiber in enumerate(forward.fibers) if fiber not in cancelled]
        forward.fibers = [forward.fibers[i] for i in kept]
        if forward.outputs:
            forward.outputs = [forward.outputs[i] for i in kept]
        for fiber, error in cancelled.items():
            fiber.end(error)

    def _parts_of(self, fibers: Sequence[Fiber], error: Exception) -> list[list[Fiber]]:
        """Of a failed joint forward: halves if memory ran out, else call by call, so that only the call that
        fails alone fails."""
        calls = [fiber.call for fiber in fibers if fiber.call is not None]
        seam, rows = calls[0].seam, sum([call.batch_size for call in calls])
        if is_out_of_memory(error):
            logger.warning("out of memory, the batch is halved", extra={"seam": seam.name, "rows": rows})
            self._scheduler.record_out_of_memory(calls[0].key, rows)
            self._stats.halved_batches += 1
            free_device_memory()
            middle = (len(fibers) + 1) // 2
            return [[*fibers[:middle]], [*fibers[middle:]]]
        if isinstance(error, Unsplittable):
            self._unsplittable.add(seam.name)
        extra = {"seam": seam.name, "rows": rows, "error": repr(error)}
        logger.warning("a joint forward failed, its calls run alone", extra=extra)
        return [[fiber] for fiber in fibers]

    def _log_unknown_arguments(self, seam: Seam) -> None:
        """Log once per seam why its calls run alone."""
        if seam.mergeable and seam.name not in self._logged:
            self._logged.add(seam.name)
            logger.info("a call with unknown arguments runs alone", extra={"seam": seam.name})


def _fail(fibers: Sequence[Fiber], failure: Exception) -> None:
    """Raise the failure of a call that ran alone in its fiber, if that was not cancelled."""
    for fiber in fibers:
        if is_out_of_memory(failure) and fiber.call is not None:
            free_device_memory()
            fiber.fail(as_out_of_memory(fiber.call, failure))
        else:
            fiber.fail(failure)
