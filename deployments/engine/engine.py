"""The engine: runs every fiber to its next parked call, and forwards for calls of many fibers together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence

import torch

from deployments.engine.call import Seam
from deployments.engine.device_streams import engine_stream
from deployments.engine.engine_stats import EngineStats
from deployments.engine.fiber import Fiber, FiberCancelled
from deployments.engine.forward_runner import ForwardRunner, InlineRunner, ThreadRunner
from deployments.engine.forward_timer import ForwardTimer, TimedForward
from deployments.engine.lane import Lane
from deployments.engine.memory_meter import MemoryMeter
from deployments.engine.out_of_memory import free_device_memory
from deployments.engine.proof_state import ProofState
from deployments.engine.step_scheduler import StepScheduler
from deployments.protocol.request import Exactness


class Engine:
    """All fibers of one device, on two lanes: denoising steps, and auxiliary calls such as a VAE's.

    Every method runs on the one thread that owns the device, under `torch.inference_mode()`: grad mode
    belongs to the thread, and fibers that set it in turns would set it for each other.
    """

    def __init__(
        self,
        scheduler: StepScheduler,
        *,
        exact: Exactness = "off",
        auxiliary_lane: bool = False,
        device: torch.device | None = None,
        meter: MemoryMeter | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """exact: the policy of requests that have none of their own; "off": no batch size is proven
        (batch_buckets.py).

        auxiliary_lane: auxiliary calls run in parallel to the steps, on a thread of their own; without it,
        they take turns with them.
        meter: measures the device's memory that forwards take.
        """
        device = device or torch.device("cpu")
        self.stream = engine_stream(device)  # to be the current one of the engine's thread
        self.stats = EngineStats()
        self.on_auxiliary_done: Callable[[], None] = lambda: None  # called on the auxiliary lane's thread
        self._scheduler = scheduler

        def lane(runner: ForwardRunner, *, observes_backlog: bool) -> Lane:
            return Lane(
                scheduler,
                runner,
                self.stats,
                self._park,
                exact=exact,
                observes_backlog=observes_backlog,
                run_by_itself=self._run_by_itself,
                meter=meter,
                now=now,
            )

        self._timer = ForwardTimer(self._record_forward, device, now)
        self._steps = lane(InlineRunner(self._timer, meter), observes_backlog=True)
        self._auxiliary = self._steps
        if auxiliary_lane:
            runner = ThreadRunner(device, self._timer, lambda: self.on_auxiliary_done(), meter)
            self._auxiliary = lane(runner, observes_backlog=False)
        self._woken: list[Fiber] = []  # in the current step
        self._lanes = (self._steps, self._auxiliary) if auxiliary_lane else (self._steps,)
        # whose calls did not fit beside the other lane's forward: each runs once more while nothing else does
        self._crowded_out: deque[Fiber] = deque()
        self._by_itself: Fiber | None = None  # whose call runs so

    @property
    def idle(self) -> bool:
        """Whether no fiber waits for anything."""
        return not self._crowded_out and all(lane.idle for lane in self._lanes)

    @property
    def waits_for_auxiliary(self) -> bool:
        """Whether the next step can do nothing before the auxiliary lane's forward is done."""
        return self._auxiliary.busy and not self._steps.waiting

    @property
    def auxiliary_busy_since(self) -> float | None:
        """time.monotonic() when the auxiliary lane's forward began; None if there is none."""
        return self._auxiliary.busy_since

    @property
    def forwards(self) -> int:
        """Forwards so far."""
        return sum(lane.forwards for lane in self._lanes)

    @property
    def rows(self) -> int:
        """Rows of these forwards together, without padding."""
        return sum(lane.rows for lane in self._lanes)

    def start(self, fiber: Fiber) -> None:
        """Run a new fiber to its first parked call; it is done at once if it makes none."""
        fiber.begin()
        self._park([fiber])
        self._woken.clear()

    def cancel(self, fiber: Fiber, error: BaseException | None = None) -> None:
        """End a parked fiber by `error` or FiberCancelled; no effect on one that is done.

        One whose call is computed on the auxiliary lane ends when that is done.
        """
        error = error or FiberCancelled()
        self._cancel_branches(fiber, error)
        if fiber.waits:
            fiber.end(error)
            return
        if fiber in self._crowded_out:
            self._crowded_out.remove(fiber)
            fiber.end(error)
            return
        for lane in self._lanes:
            if lane.cancel(fiber, error):
                return

    def step(self, *, block: bool = True) -> list[Fiber]:
        """One forward on each lane that has calls and is free; returns the fibers that moved on.

        block: wait for the auxiliary lane if there is nothing else to do.
        """
        moved = self._step(block=block)
        woken, self._woken = self._woken, []
        return moved + woken

    @property
    def has_trials(self) -> bool:
        """Whether there are batch sizes to try (batch_buckets.py)."""
        return self._steps.has_trials

    def run_trial(self, *, before_traffic: bool = False) -> bool:
        """Run one forward of the trials of batch sizes; False if there is nothing to try.

        before_traffic: no request has been computed yet.
        """
        return self._steps.run_trial(before_traffic=before_traffic)

    def forget(self, seams: Collection[Seam]) -> None:
        """Keep nothing of these seams, whose modules are going to be freed. None of their calls waits."""
        for lane in self._lanes:
            lane.forget(seams)

    def proofs(self) -> list[ProofState]:
        """What is known of batch sizes, by module and shape; may be called from any thread."""
        return self._steps.proofs()

    def wait_for_device(self) -> None:
        """Wait until the device is at most one forward behind; returns at once on a CPU."""
        self._timer.wait()

    def close(self) -> None:
        """End the auxiliary lane's thread."""
        self._auxiliary.close()

    def _cancel_branches(self, fiber: Fiber, error: BaseException) -> None:
        for branch in fiber.branches:
            self.cancel(branch, error)
        fiber.branches.clear()  # they and the fiber refer to each other

    def _step(self, *, block: bool) -> list[Fiber]:
        if self._auxiliary is self._steps:
            return self._steps.step()
        moved = self._auxiliary.finish(block=block and not self._steps.waiting)
        if self._crowded_out and not self._auxiliary.busy:
            self._by_itself = self._crowded_out.popleft()
            moved += self._steps.run_now(self._by_itself)
            self._by_itself = None
        if not self._crowded_out:
            moved += self._auxiliary.step()
        return moved + self._steps.step()

    def _park(self, fibers: Sequence[Fiber]) -> None:
        """Put fibers on the lane of the call that they have parked for, and those that they have woken.

        Fibers that are done have no call. The branches of one that has failed are cancelled.
        """
        moved = deque(fibers)
        while moved:
            fiber = moved.popleft()
            call = fiber.call
            if call is not None:
                (self._auxiliary if call.seam.auxiliary else self._steps).add(fiber, call)
            elif fiber.done and fiber.failure is not None:
                self._cancel_branches(fiber, FiberCancelled())
            for woken in fiber.take_woken():
                woken.begin()
                self._woken.append(woken)
                moved.append(woken)

    def _run_by_itself(self, fiber: Fiber) -> bool:
        """Take a fiber whose call did not fit, to run it while the other lane is idle; False if it was."""
        was_auxiliary = fiber.call is not None and fiber.call.seam.auxiliary
        was_shared = len(self._lanes) > 1 and (was_auxiliary or self._auxiliary.busy)
        if fiber is self._by_itself or not was_shared:
            return False
        free_device_memory()
        self._crowded_out.append(fiber)
        return True

    def _record_forward(self, forward: TimedForward, seconds: float, now: float) -> None:
        jobs = forward.jobs
        self._scheduler.record_forward(forward.key, forward.batch_size, seconds, jobs, now)
        self.stats.record_forward(forward.module, jobs[0].labels, forward.batch_size, seconds)
