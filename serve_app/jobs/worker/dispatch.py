"""Sends waiting jobs to models: never more than they take, as soon as there is capacity."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from types import MappingProxyType

from deployments.protocol import log_context
from deployments.protocol.errors import WeftError
from deployments.protocol.log_context import LogContext
from serve_app.jobs.job import COPY_QUEUE
from serve_app.jobs.store.indexes import NEW_WORK
from serve_app.jobs.store.leases import Claim
from serve_app.jobs.store.start_estimate import Capacity, Demand, dispatcher_name
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.store.wakeups import wait_for_wakeup
from serve_app.jobs.worker.attempt import Attempt, ModelBackend
from serve_app.jobs.worker.cluster_role import ClusterRole
from serve_app.jobs.worker.job_metrics import attempt_fields, count_attempt_end, log_attempt_end
from serve_app.jobs.worker.lease_keeper import AbortReason
from serve_app.observability.metrics import LocalMeter, Meter
from serve_app.observability.tracing import continue_trace
from serve_app.redis.cancellation import raise_if_cancelled
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore

COPIERS = 8  # jobs at once that only copy files
POLL_S = 1.0  # wake-ups may be lost, and models gain slots without any
TIME_LIMIT_S = 600.0  # of a job whose model has none
DRAIN_LIMIT_S = 15.0
WITHDRAW_LIMIT_S = 2.0  # for the last write to a store that may not answer

logger = logging.getLogger(__name__)


class Dispatcher:
    """Claims jobs and runs each in a task of its own, until drained. Any number may share a store.

    models: counts its slots and runs requests.  time_limits_s: per model, from Started to the end.
    """

    def __init__(
        self,
        store: JobStore,
        results: ResultStore,
        models: ModelBackend,
        settings: Settings,
        *,
        time_limits_s: Mapping[str, float] = MappingProxyType({}),
        meter: Meter | None = None,
        report_demand: Callable[[Mapping[str, Demand]], Awaitable[None]] | None = None,
        role: ClusterRole | None = None,
    ) -> None:
        """report_demand: receives every second the jobs per model that wait for this cluster and run there.

        role: which jobs are for this cluster; None: all, there is no other.
        """
        self._store = store
        self._results = results
        self._models = models
        self._settings = settings
        self._time_limits_s = time_limits_s
        self._meter = meter or LocalMeter()
        self._report_demand = report_demand
        self._role = role
        self._wakeups = store.work_wakeups()
        self._running: dict[asyncio.Task[None], Attempt] = {}
        self._draining = False
        self._wakeup = asyncio.Event()  # there is new work, a job has ended, or the dispatcher drains
        self._reap_at = 0.0
        self._report_at = 0.0
        self._reported: set[str] = set()  # queues whose capacity is in the store
        # among the dispatchers that share the store
        self._name = dispatcher_name(role.cluster if role else "", secrets.token_hex(4))

    @property
    def active(self) -> int:
        """How many jobs run here now."""
        return len(self._running)

    async def run(self) -> None:
        """Dispatch until `drain`, or until cancelled (then it drains as well). No error ends it."""
        try:
            with self._wakeups.subscribe(NEW_WORK) as self._wakeup:
                await self._wakeups.ensure_subscribed()
                while not self._draining:
                    try:
                        await self._reap()
                        if self._role is not None:
                            await self._role.update([*self._models.free_slots(), COPY_QUEUE])
                        await self._claim_jobs()
                        await self._report_capacity()
                    except WeftError as error:
                        logger.warning("no jobs can be claimed: %s", error.message)
                        self._postpone_reaping()
                    except Exception:
                        logger.exception("a round of the dispatcher failed; it continues")
                    raise_if_cancelled()
                    if not self._draining:
                        await wait_for_wakeup(self._wakeup, min(POLL_S, self._settings.heartbeat_s))
        finally:
            await self.drain()
            await self._withdraw()
            await self._wakeups.aclose()

    async def drain(self) -> None:
        """Claim nothing more and release running jobs at once; this costs them no attempt."""
        self._draining = True
        self._wakeup.set()
        for attempt in self._running.values():
            attempt.abort(AbortReason.drained)
        if self._running:
            _, late = await asyncio.wait(set(self._running), timeout=DRAIN_LIMIT_S)
            for task in late:  # their leases will expire
                task.cancel()

    async def _withdraw(self) -> None:
        """Remove our capacity from the store, so that another cluster need not wait until it expires."""
        with suppress(WeftError, TimeoutError):
            async with asyncio.timeout(WITHDRAW_LIMIT_S):
                await self._store.throughput.withdraw(self._name, self._reported)

    async def _claim_jobs(self) -> None:
        while not self._draining and (free := self._claimable()):
            claim = await self._store.leases.claim(free)
            if claim is None:
                return
            self._start(claim)

    def _claimable(self) -> dict[str, int]:
        """Free slots by queue, of the queues whose jobs are for this cluster."""
        free = self._free_slots() | self._free_copiers()
        return {queue: slots for queue, slots in free.items() if self._may_claim(queue)}

    def _may_claim(self, queue: str) -> bool:
        return self._role is None or self._role.may_claim(queue)

    def _free_slots(self) -> dict[str, int]:
        """Free slots per model, less the claimed jobs that the models have not counted yet."""
        waiting = Counter(
            attempt.claim.job.request.model
            for attempt in self._running.values()
            if not attempt.taken_by_model
        )
        free = {model: slots - waiting[model] for model, slots in self._models.free_slots().items()}
        return {model: slots for model, slots in free.items() if slots > 0}

    def _free_copiers(self) -> dict[str, int]:
        copying = sum(attempt.claim.job.cached_from is not None for attempt in self._running.values())
        return {COPY_QUEUE: COPIERS - copying} if copying < COPIERS else {}

    async def _report_capacity(self) -> None:
        """Every POLL_S: what runs here and could, for estimates, autoscaling and gauges."""
        now = time.monotonic()
        if now < self._report_at:
            return
        self._report_at = now + POLL_S
        running = Counter(
            attempt.claim.job.request.model
            for attempt in self._running.values()
            if attempt.claim.job.cached_from is None
        )
        free, models = self._claimable(), list(self._models.free_slots())
        throughput = self._store.throughput
        capacities = {
            queue: Capacity(running[queue] + free.get(queue, 0), free.get(queue, 0))
            for queue in (*models, *([COPY_QUEUE] if self._role else []))
        }
        self._reported |= capacities.keys()
        await throughput.report(self._name, capacities)
        if self._report_demand is not None:
            demand = await throughput.demand(models, self._role.cluster if self._role else None)
            own = {
                model: found if self._may_claim(model) else Demand(0, found.running)
                for model, found in demand.items()
            }
            await self._report_demand(own)
        for model, waiting in (await throughput.queued(models)).items():
            self._meter.put("weft_jobs_queued", waiting, model=model)
            self._meter.put("weft_jobs_running", running[model], model=model)
            self._meter.put("weft_slots_free", free.get(model, 0), model=model)

    def _start(self, claim: Claim) -> None:
        attempt = Attempt(
            claim,
            store=self._store,
            results=self._results,
            models=self._models,
            settings=self._settings,
            time_limit_s=self._time_limits_s.get(claim.job.request.model, TIME_LIMIT_S),
        )
        if self._draining:
            attempt.abort(AbortReason.drained)
        task = asyncio.create_task(self._run_one(attempt))
        self._running[task] = attempt
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._wakeup.set()

    async def _run_one(self, attempt: Attempt) -> None:
        claim, job = attempt.claim, attempt.claim.job
        log_context.bind(LogContext(job.id, job.request_id, job.trace))  # of this task, and its children
        try:
            with (
                continue_trace(job.trace, f"dispatch {job.request.model}"),
                self._wakeups.subscribe(job.id) as wakeup,
            ):
                left = await attempt.run(wakeup)
            log_attempt_end(claim, left)
            if left is not None:
                count_attempt_end(self._meter, left)
        except Exception:
            logger.exception("an attempt was lost; its lease will expire", extra=attempt_fields(claim))

    async def _reap(self) -> None:
        """Every heartbeat_s: requeue jobs of dead workers, and remove the files of those that ended."""
        now = time.monotonic()
        if now < self._reap_at:
            return
        self._reap_at = now + self._settings.heartbeat_s
        for job in await self._store.leases.reap():
            self._meter.add("weft_leases_lost_total", model=job.request.model)
            logger.warning(
                "a lease expired", extra={"job_id": job.id, "attempt": job.attempt, "state": job.state}
            )
            if job.state.ended:
                count_attempt_end(self._meter, job)
                await self._results.sweep(job.id)

    def _postpone_reaping(self) -> None:
        """After an outage every lease may have expired though the workers live: let them renew first."""
        self._reap_at = time.monotonic() + 2 * self._settings.heartbeat_s
