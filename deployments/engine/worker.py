"""The engine's thread: takes work from asyncio and returns an async iterator of its events."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Container
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from deployments.engine.commands import (
    Break,
    Cancel,
    Command,
    Drain,
    RunFunction,
    Stop,
    Submit,
    Wake,
    run_function,
    settle,
)
from deployments.engine.device_errors import DeviceBroken, causes_of, is_device_broken
from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.proof_state import ProofState
from deployments.engine.scheduled_job import ScheduledJob
from deployments.engine.step_scheduler import StepScheduler
from deployments.engine.work import Checkpointed, Finished, Work, WorkItem, as_weft_error, preempt
from deployments.protocol.errors import (
    ModelUnavailable,
    NotFinite,
    Overloaded,
)
from deployments.protocol.events import Failed, Queued, Started

MIN_SLOWDOWN = 4  # a request alone takes at most so many times its share of full forwards
EXIT_TIMEOUT_S = 10.0  # that the end of the process waits for the current step
AHEAD = 2  # steps that a GPU may be behind: an error is found so much later than its cause

logger = logging.getLogger(__name__)


class Worker:
    """Runs submitted work as fibers, at most `slots` at once; the scheduler chooses who gets a slot."""

    def __init__(
        self, engine: Engine, scheduler: StepScheduler, *, slots: int, watchdog_s: float = 300.0
    ) -> None:
        """scheduler: the engine's own.

        watchdog_s: `check` raises when one forward, or the pipeline code between two, takes longer.
        """
        self._engine = engine
        self._scheduler = scheduler
        self._slots = slots
        self._watchdog_s = watchdog_s
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._waiting: list[WorkItem] = []
        self._running: dict[Fiber, WorkItem] = {}
        self._open = 0  # submitted and not yet ended; counted on the asyncio side
        self._jobs: set[ScheduledJob] = set()  # of those
        self._recent_s: deque[float] = deque(maxlen=32)  # work of the latest submitted
        self._stopping = False
        self._broken_outside = False  # the device failed outside of the engine
        self._lost = ""  # why the engine cannot go on; set once
        # of the fibers that moved on in the latest steps
        self._recent_jobs: deque[list[ScheduledJob]] = deque(maxlen=AHEAD if torch.cuda.is_available() else 0)
        self._ended = False  # the inbox is not read any more
        self._busy_since: float | None = None  # time.monotonic() when the current step began
        self.stats = engine.stats
        engine.on_auxiliary_done = lambda: self._inbox.put(Wake())
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()
        # a thread that computes while the interpreter ends aborts the process
        weakref.finalize(self, _end_thread, self._inbox, self._thread)

    @property
    def active(self) -> int:
        """Requests submitted and not yet ended."""
        return self._open

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run and requests that wait for a slot."""
        return len(self._running), len(self._waiting)

    def work_seconds(self) -> tuple[float, float, float]:
        """Device seconds: done so far, left in open requests, and the mean of the last 32 requests (0 before
        the first). Called on the thread of the submitters."""
        mean_s = sum(self._recent_s) / len(self._recent_s) if self._recent_s else 0.0
        return self._scheduler.work_done_s, self._scheduler.work_left_s([*self._jobs]), mean_s

    @property
    def lost(self) -> bool:
        """Whether the engine or its device failed, so that this process can compute nothing more."""
        return bool(self._lost)

    def report_broken_device(self, error: BaseException) -> None:
        """End the engine: the device failed outside of it. May be called from any thread."""
        self._lose(error)
        self._broken_outside = True
        self._inbox.put(Break(error))

    def check(self) -> None:
        """Raises ModelUnavailable if the thread is dead or hangs, or the device is broken."""
        if self._lost:
            raise ModelUnavailable(f"the engine's thread is dead: {self._lost}; the replica must be replaced")
        if not self._thread.is_alive():
            raise ModelUnavailable("the engine's thread is dead; the replica must be replaced")
        begun = [
            since for since in (self._busy_since, self._engine.auxiliary_busy_since) if since is not None
        ]
        if begun and (busy_s := time.monotonic() - min(begun)) > self._watchdog_s:
            raise ModelUnavailable(
                f"the engine has been stuck for {busy_s:.0f} s (watchdog: {self._watchdog_s:g} s); "
                "the replica must be replaced"
            )

    async def submit(
        self,
        work: Work,
        job: ScheduledJob,
        *,
        max_wait_s: float | None = None,
        snapshot: Callable[[], Any] | None = None,
    ) -> AsyncGenerator[Any]:
        """Yields Queued, Started, what the work emits, then Finished or Failed.

        max_wait_s: fail with Overloaded if a slot is expected to be free only later.
        snapshot: returns the state of the running work, to resume it on another replica, or None; called on
        the worker's thread while the work is parked, when the worker drains or stops.
        Closing the iterator cancels the work, before it starts or at its next parked call.
        Raises ModelUnavailable if the worker hangs or shuts down. Work that finds it dead is handed over:
        Checkpointed, then Failed.
        """
        if self._lost:
            yield Checkpointed(None)
            yield Failed.of(self._lost_error())
            return
        self.check()
        if self._stopping:
            raise ModelUnavailable("this replica is shutting down; try again")
        job.submitted_at = time.monotonic()
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        submission = WorkItem(work, job, loop, max_wait_s, snapshot, self.stats, context)
        self._open += 1
        self._jobs.add(job)
        self._put(Submit(submission))
        try:
            while True:
                item = await submission.items.get()
                yield item
                if isinstance(item, Finished | Failed):
                    return
        finally:
            self._open -= 1
            self._jobs.discard(job)
            self._recent_s.append(self._scheduler.work_left_s([replace(job, steps_done=0)]))
            self._inbox.put(Cancel(submission))  # without effect on work that is over

    async def run_on_thread(self, function: Callable[[], Any]) -> Any:
        """The function's result or error; it runs on the worker's thread between two forwards."""
        self.check()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()
        self._put(RunFunction(function, done, loop))
        return await done

    def _put(self, command: Command) -> None:
        """Have the thread execute the command, or refuse it here if the thread has ended meanwhile."""
        self._inbox.put(command)
        if self._ended:
            self._refuse_rest()

    async def prove_all(self, limit_s: float) -> None:
        """Try batch sizes with the shapes seen so far, before the first request of a user, for at most
        `limit_s` seconds; those that are left are tried when nothing waits."""

        def run_trial() -> bool:
            return self._engine.idle and self._engine.run_trial(before_traffic=True)

        ends_at = time.monotonic() + limit_s
        while time.monotonic() < ends_at and await self.run_on_thread(run_trial):
            pass

    def proofs(self) -> list[ProofState]:
        """What is known of batch sizes, by module and shape; may be called from any thread."""
        return self._engine.proofs()

    def drain(self, grace_s: float) -> None:
        """Refuse new work; preempt at once what waits and what would not end within `grace_s` seconds."""
        self._stopping = True
        self._inbox.put(Drain(grace_s))

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after the current step; what still runs fails as retryable."""
        self._stopping = True
        self._inbox.put(Stop())
        self._thread.join(timeout_s)

    # ---- everything below runs on the worker's thread ----

    def _main(self) -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(self._engine.stream):
                while self._process_commands():
                    moved = self._start_waiting()
                    if not self._engine.idle:
                        self._busy_since = time.monotonic()
                        moved += self._engine.step(block=False)
                    self._recent_jobs.append([fiber.job.request for fiber in moved])
                    self._publish_finished(moved)
                    if self._engine.idle and self._engine.has_trials:
                        self._busy_since = time.monotonic()
                        self._engine.run_trial()
                    self._engine.wait_for_device()  # before commands are read: they are new then
                    self._busy_since = None
        except BaseException as error:  # the outermost loop: an error of the engine itself ends this replica
            logger.exception("the engine's thread died")
            self._lose(error)
            self._give_back(self._suspects(error))
        else:
            for submission in itertools.chain(self._running.values(), self._waiting):
                preempt(submission)
        self._engine.close()
        self._stopping = self._ended = True
        self._refuse_rest()

    def _process_commands(self) -> bool:
        """Execute all commands in the inbox; wait for one if there is nothing else to do. False: stop."""
        can_start = self._waiting and len(self._running) < self._slots
        idle = self._engine.idle and not self._engine.has_trials
        wait = not can_start and (idle or self._engine.waits_for_auxiliary)
        while True:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            match command:
                case Submit(submission):
                    self._accept(submission)
                case Cancel(submission):
                    self._cancel(submission)
                case RunFunction():
                    run_function(command)
                case Drain(grace_s):
                    self._drain(grace_s)
                case Stop():
                    return False
                case Break(error):
                    raise DeviceBroken([]) from error
                case Wake():
                    pass

    def _accept(self, submission: WorkItem) -> None:
        """Queue the work and publish its place, or refuse it if the wait would be too long."""
        queued = [*(waiting.job for waiting in self._waiting), submission.job]
        if len(self._running) + len(queued) <= self._slots:
            submission.publish(Queued(0, 0.0))
        else:
            active = [running.job for running in self._running.values()]
            forecast = self._scheduler.forecast(queued, active, time.monotonic(), slots=self._slots)[-1]
            wait_s = forecast.starts_in_s
            if submission.max_wait_s is not None and wait_s is not None and wait_s > submission.max_wait_s:
                message = (
                    f"the model is busy: about {wait_s:.0f} s until a slot is free, "
                    f"at most {submission.max_wait_s:g} s are allowed; try again later"
                )
                submission.publish(
                    Failed.of(Overloaded(message, retry_after_s=wait_s - submission.max_wait_s))
                )
                return
            submission.publish(Queued(forecast.ahead, wait_s, forecast.finishes_in_s))
        self._waiting.append(submission)

    def _start_waiting(self) -> list[Fiber]:
        """Fill the free slots; returns the fibers that began."""
        begun: list[Fiber] = []
        while self._waiting and len(self._running) < self._slots:
            now = time.monotonic()
            self._busy_since = now
            chosen = 0
            if len(self._waiting) > 1:
                queued = [submission.job for submission in self._waiting]
                active = [submission.job for submission in self._running.values()]
                chosen = self._scheduler.next_job(queued, active, now)
            submission = self._waiting.pop(chosen)
            submission.started_at = now
            submission.publish(Started(submission.job.steps))
            work, emit = submission.work, submission.emit
            fiber = Fiber(lambda work=work, emit=emit: work(emit), submission.job)  # type: ignore[misc]
            fiber.gr_context = submission.context
            submission.fiber = fiber
            self._running[fiber] = submission
            self._engine.start(fiber)
            self._busy_since = None
            begun.append(fiber)
            self._publish_finished([fiber])  # its slot may be free again
        return begun

    def _publish_finished(self, fibers: list[Fiber]) -> None:
        """Publish the outcome of those that are done. Raises DeviceBroken if that is what one of them met."""
        for fiber in fibers:
            if not fiber.done:
                continue
            if fiber.failure is not None and is_device_broken(fiber.failure):
                raise DeviceBroken([fiber]) from fiber.failure
            submission = self._running.pop(fiber, None)
            if submission is None:  # preempted while its call ran on the auxiliary lane
                continue
            self.stats.requests += 1
            if fiber.failure is not None:
                failed = submission.context.run(as_weft_error, fiber.failure)
                fiber.release_frames()
                self.stats.record_failure(
                    "not_finite" if isinstance(fiber.failure, NotFinite) else failed.kind
                )
                submission.publish(Failed.of(failed))
                continue
            now = time.monotonic()
            queued_s = submission.started_at - submission.job.submitted_at
            run_s = now - submission.started_at
            submission.publish(Finished(fiber.result, queued_s, run_s, fiber.unproven))

    def _lose(self, error: BaseException) -> None:
        """Let `check` fail from now on."""
        if self._lost:
            return
        if not is_device_broken(error):
            self._lost = "the engine failed"
            return
        self._lost = "the device failed"
        self.stats.device_failures += 1
        logger.critical("the device is broken", extra={"error": repr(list(causes_of(error))[-1])})

    def _suspects(self, error: BaseException) -> set[ScheduledJob]:
        """The requests that may have caused it: all that run, unless it is known whose forward failed.

        On a GPU an error is found later than its cause, and may come from the other lane's forward.
        A trial of a batch size belongs to no request, but has the shapes of one that runs.
        """
        broken = next((one for one in causes_of(error) if isinstance(one, DeviceBroken)), None)
        if broken is None or not (broken.fibers or self._broken_outside):
            return {fiber.job for fiber in self._running}
        suspects = {fiber.job.request for fiber in broken.fibers}.union(*self._recent_jobs)
        if torch.cuda.is_available():
            parked = itertools.chain(self._running, *(fiber.branches for fiber in self._running))
            suspects |= {fiber.job.request for fiber in parked if fiber.call and fiber.call.seam.auxiliary}
        return suspects

    def _give_back(self, suspects: Container[ScheduledJob]) -> None:
        """End all open requests as retryable. The retry of a suspect must count; others are handed over.

        Without their states: what a failed device or engine holds is not trusted.
        """
        for submission in itertools.chain(self._running.values(), self._waiting):
            if submission.job in suspects:
                self.stats.requests += 1
                self.stats.record_failure(ModelUnavailable.kind)
            else:
                self.stats.preempted += 1
                submission.publish(Checkpointed(None))
            submission.publish(Failed.of(self._lost_error()))

    def _refuse_rest(self) -> None:
        """Answer what was put into the inbox after the thread's last look. Any thread may call it."""
        with suppress(queue.Empty):
            while True:
                match self._inbox.get(block=False):
                    case Submit(submission):
                        submission.publish(Checkpointed(None))
                        submission.publish(Failed.of(self._lost_error()))
                    case RunFunction() as command:
                        settle(command, None, self._lost_error())

    def _lost_error(self) -> ModelUnavailable:
        reason = self._lost or "the replica is shutting down"
        return ModelUnavailable(f"{reason}; the request continues on another replica, or try again")

    def _cancel(self, submission: WorkItem) -> None:
        if submission.fiber is None:
            with suppress(ValueError):  # it was refused, preempted or has ended
                self._waiting.remove(submission)
        elif submission.fiber in self._running:
            self._engine.cancel(submission.fiber)
            self._publish_finished([submission.fiber])

    def _drain(self, grace_s: float) -> None:
        """Preempt all but the running work that ends within `grace_s` seconds."""
        self.stats.preempted += len(self._waiting)
        for submission in self._waiting:
            preempt(submission)
        self._waiting.clear()
        for fiber, submission in list(self._running.items()):
            left_s = self._scheduler.remaining_s(submission.job)
            if left_s is not None and left_s * max(MIN_SLOWDOWN, len(self._running)) < grace_s:
                continue  # ends in time even if no forward is shared
            del self._running[fiber]
            self.stats.preempted += 1
            preempt(submission)
            self._engine.cancel(fiber)


def _end_thread(inbox: queue.SimpleQueue[Command], thread: threading.Thread) -> None:
    """Have the thread end after its current step, and wait for that."""
    inbox.put(Stop())
    thread.join(EXIT_TIMEOUT_S)
