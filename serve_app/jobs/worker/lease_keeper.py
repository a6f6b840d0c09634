"""Keeps the lease of a running job, and publishes its progress in the same heartbeats."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum

from deployments.protocol.errors import WeftError
from serve_app.jobs.events import Event, Step
from serve_app.jobs.job import ResumePoint
from serve_app.jobs.store.leases import Claim, Leases, StaleClaim
from serve_app.jobs.store.wakeups import wait_for_wakeup

OUTAGE_FIRST_S, OUTAGE_MAX_S = 0.05, 1.0  # between calls to a store that does not answer
PENDING_EVENTS_KEPT = 128  # events that wait for the store during an outage


class AbortReason(Enum):
    """Why an attempt ends before its model has."""

    cancelled = "cancelled"
    stale_claim = "stale_claim"
    drained = "drained"
    too_long = "too_long"
    never_started = "never_started"


class LeaseKeeper:
    """Sends heartbeats: in time for the lease, and at once when there are events. Used for one attempt."""

    def __init__(
        self,
        claim: Claim,
        leases: Leases,
        heartbeat_s: float,
        wakeup: asyncio.Event,
        abort: Callable[[AbortReason], None],
    ) -> None:
        """wakeup: set when cancellation was requested.  abort: called when the attempt must end early."""
        self.step, self.steps = claim.job.step, claim.job.steps  # 0 unless it continues from a resume point
        self.device_us = 0  # device microseconds of this attempt so far
        self.resume_point = claim.job.resume_point  # that of the job's record
        self._next_resume_point: ResumePoint | None = None
        self._claim = claim
        self._leases = leases
        self._heartbeat_s = heartbeat_s
        self._wakeup = wakeup
        self._abort = abort
        self._pending_events: deque[Event] = deque(maxlen=PENDING_EVENTS_KEPT)
        self._closing = False

    def record_step(self, step: int, steps: int) -> None:
        """Publish how many denoising steps are done; the number never goes back."""
        self.step, self.steps = max(step, self.step), steps
        self.publish(Step(self.step, steps))

    def publish(self, event: Event) -> None:
        """Send the event with the next heartbeat. Never waits: the store may be slow or unreachable."""
        self._pending_events.append(event)
        self._wakeup.set()

    def record_device_time(self, seconds: float) -> None:
        """Store the attempt's device seconds with the next heartbeat, and with its end."""
        self.device_us = max(self.device_us, round(seconds * 1e6))

    def record_resume_point(self, resume_point: ResumePoint) -> None:
        """Have the job's record name it with the next heartbeat, so that it outlives this worker."""
        self._next_resume_point = resume_point
        self._wakeup.set()

    def close(self) -> None:
        """End `keep` once the pending events are published."""
        self._closing = True
        self._wakeup.set()

    async def keep(self) -> None:
        """Send heartbeats until `close`, or until another worker has the job."""
        pauses = outage_pauses()
        while self._pending_events or not self._closing:
            if not self._pending_events:
                await wait_for_wakeup(self._wakeup, self._heartbeat_s)
            self._wakeup.clear()
            if self._closing and not self._pending_events:
                return
            try:
                cancel_requested = await self._beat()
            except StaleClaim:
                self._abort(AbortReason.stale_claim)
                return
            except WeftError:  # unreachable or full: the model goes on, and the lease decides
                await asyncio.sleep(next(pauses))
                continue
            pauses = outage_pauses()
            if cancel_requested:
                self._abort(AbortReason.cancelled)

    async def _beat(self) -> bool:
        """Whether cancellation was requested. Events that could not be published are pending again."""
        sent = list(self._pending_events)
        self._pending_events.clear()
        resume_point = self._next_resume_point
        try:
            cancel_requested = await self._leases.heartbeat(
                self._claim,
                step=self.step,
                steps=self.steps,
                pending_events=sent,
                resume_point=resume_point,
                device_us=self.device_us,
            )
            self.resume_point = resume_point or self.resume_point
            if self._next_resume_point is resume_point:
                self._next_resume_point = None
            return cancel_requested
        except WeftError:
            space = PENDING_EVENTS_KEPT - len(self._pending_events)
            self._pending_events.extendleft(reversed(sent[:space]))
            raise


def outage_pauses() -> Iterator[float]:
    """Seconds to wait between calls to a store that does not answer: doubling up to OUTAGE_MAX_S.

    A retry library would cost about 0.1 ms for each call that succeeds, and there is one per step.
    """
    pause_s = OUTAGE_FIRST_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, OUTAGE_MAX_S)
