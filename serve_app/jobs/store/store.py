"""The durable store of jobs: accepted once, run under a lease, ended once, whoever dies.

The job hash is the only truth; the sorted sets are indexes that change in the same MULTI/EXEC. Every
change is WATCH, check state and attempt, write: no Lua, so the server's ACL can deny scripting. Leases
run on the server's clock. Values are JSON.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from deployments.protocol.errors import BadRequest, Conflict, NotFound
from deployments.protocol.request import ResolvedRequest
from deployments.validation.resolve import Adjustment
from serve_app.jobs import events as job_events
from serve_app.jobs.job import (
    DEFAULT_OPTIONS,
    Job,
    JobError,
    JobState,
    ResumePoint,
    StoredArtifact,
    SubmitOptions,
)
from serve_app.jobs.store.acceptance import Acceptance
from serve_app.jobs.store.fair_queue import virtual_time_at
from serve_app.jobs.store.outbox import Outbox
from serve_app.jobs.store.owner_index import JobPage, OwnerIndex
from serve_app.jobs.store.record import Keys, job_from
from serve_app.jobs.store.result_cache import ResultCache
from serve_app.jobs.store.start_estimate import Capacity
from serve_app.jobs.store.throughput import Demand, ThroughputStats
from serve_app.jobs.store.transitions import NO_GROUP, CoalescedGroup, Transitions
from serve_app.jobs.store.wakeups import Wakeups
from serve_app.redis.transactions import begin, clock_us, get_hash, redis_errors, transact
from serve_app.settings import Settings

NO_SUCH_JOB = "no such job; it may have been deleted or forgotten, or it is not yours"
FROM_START = "0-0"  # before every event id
HEADS = 4  # oldest jobs looked at per model, so that dispatchers who collide take the next one
CLAIM_ROUNDS = 8
WORKER_LOST = (
    "the worker was lost {failures} times while it ran this job; it was given up. "
    "A smaller size or fewer pictures may help."
)


Finish = Callable[
    [Pipeline, Job, int, CoalescedGroup], Job
]  # queues writes; the int is the server's time in us


class StaleClaim(Exception):
    """The job was given to somebody else, or has ended: whatever this attempt made is discarded."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A job under a lease. Its attempt number is the fence of every later write."""

    job: Job

    @property
    def attempt(self) -> int:
        return self.job.attempt


class JobStore:
    """All changes a job can go through. Raises StoreUnreachable whenever the server cannot be asked."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self.redis = redis  # made by transaction.connect
        self._keys = Keys(settings.redis_prefix)
        self._settings = settings
        self._transitions = Transitions(self._keys, settings)
        self._throughput = ThroughputStats(redis, self._keys)
        self._acceptance = Acceptance(redis, self._keys, settings, self._transitions, self._throughput)

    def work_wakeups(self) -> Wakeups:
        """Tells NEW_WORK, and the id of a running job that shall be cancelled."""
        return Wakeups(self.redis, self._keys.work_channel)

    def event_wakeups(self) -> Wakeups:
        """Tells the id of a job that has a new event."""
        return Wakeups(self.redis, self._keys.events_channel)

    async def ping(self) -> None:
        """Raises StoreUnreachable unless the server answers."""
        with redis_errors():
            await self.redis.ping()

    # ---- callers -------------------------------------------------------------------------------

    async def accept(
        self,
        job_id: str,
        owner: str,
        request: ResolvedRequest,
        warnings: tuple[Adjustment, ...] = (),
        options: SubmitOptions = DEFAULT_OPTIONS,
    ) -> Job:
        """The queued job, durable now. The same id, or the same Idempotency-Key, gives the job there is.

        A request like one that has completed copies its files; like one in progress, it waits for them.
        Raises Overloaded past max_pending (which other processes may pass by a job each meanwhile) and
        terms.max_wait_s, RateLimited past max_active_per_owner,
        Conflict when the key came with another body before, QuotaExceeded past terms.images_per_day.
        """
        return await self._acceptance.accept(job_id, owner, request, warnings, options)

    async def get(self, job_id: str) -> Job:
        """The job as it stands. Raises NotFound."""
        with redis_errors():
            fields = await get_hash(self.redis, self._keys.job(job_id))
        return _known(job_id, fields)

    async def position(self, job: Job) -> int | None:
        """1: next to be claimed among its model's jobs; None when it does not wait.

        A job that waits for an identical one has that one's place. Others with fewer jobs waiting may
        still come before it, so the number can also grow.
        """
        with redis_errors():
            rank = await self.redis.zrank(self._keys.pending_of(job.queue), job.leader or job.id)
        return None if rank is None else cast(int, rank) + 1

    async def starts_in_s(self, job: Job, position: int) -> float | None:
        """Seconds until the waiting job probably begins; None when there is nothing to tell it by."""
        with redis_errors():
            throughput = await self._throughput.read(self.redis, job.request.model)
        return throughput.starts_in_s(position)

    async def report_capacity(self, dispatcher: str, capacities: Mapping[str, Capacity]) -> None:
        """What this dispatcher runs, and could; forgotten a while after it was told last."""
        with redis_errors():
            await self._throughput.report(dispatcher, capacities)

    async def queued(self, models: Sequence[str]) -> dict[str, int]:
        """How many jobs wait for each model."""
        with redis_errors():
            async with self.redis.pipeline(transaction=False) as pipe:
                for model in models:
                    pipe.zcard(self._keys.pending_of(model))
                return dict(zip(models, await pipe.execute(), strict=True))

    async def demand(self, models: Sequence[str]) -> dict[str, Demand]:
        """What waits for each model and what dispatchers have taken, for whoever scales it."""
        waiting = await self.queued(models)
        with redis_errors():
            running = await self._throughput.running(models)
        return {model: Demand(waiting[model], running[model]) for model in models}

    async def page(
        self,
        owner: str,
        *,
        cursor: str | None = None,
        limit: int = 50,
        state: JobState | None = None,
        model: str | None = None,
    ) -> JobPage:
        """The owner's jobs, newest first. A page may be short and still have a next_cursor.

        Raises BadRequest for a cursor that is none of ours.
        """
        index = OwnerIndex(self.redis, self._keys, owner)
        with redis_errors():
            return await index.page(cursor=cursor, limit=limit, state=state, model=model)

    async def cancel(self, job_id: str) -> Job:
        """The job: cancelled if it waited, marked and soon cancelled if it runs, unchanged if it ended."""
        keys = self._keys

        async def decide(pipe: Pipeline) -> Job:
            job = await self._read(pipe, job_id)
            if job.state.ended or job.cancel_requested:
                return job
            if job.state is JobState.queued:
                group = await self._coalesced_group(pipe, job)
                now_us = await clock_us(pipe)
                begin(pipe)
                return self._transitions.end(pipe, job, JobState.cancelled, now_us, group)
            begin(pipe)
            return self._transitions.request_cancel(pipe, job)

        return await transact(self.redis, [keys.job(job_id)], decide)

    async def delete(self, job_id: str) -> None:
        """Forget an ended job and its events. Raises Conflict while it is active."""
        keys = self._keys

        async def decide(pipe: Pipeline) -> None:
            job = await self._read(pipe, job_id)
            if not job.state.ended:
                raise Conflict(f"the job is {job.state.value}; cancel it first")
            group = await self._coalesced_group(pipe, job)
            begin(pipe)
            self._transitions.forget(pipe, job, group)

        await transact(self.redis, [keys.job(job_id)], decide)

    async def events(self, job_id: str, after: str = FROM_START) -> list[tuple[str, job_events.Event]]:
        """What happened after the event with id `after`. Raises BadRequest for a malformed id."""
        if not re.fullmatch(r"\d{1,20}-\d{1,20}", after):
            raise BadRequest(f"{after[:64]!r} is not an event id; leave it out to see all events")
        with redis_errors():
            entries = await self.redis.xrange(self._keys.events(job_id), min=f"({after}")
        found = cast(list[tuple[str, dict[str, str]]], entries)
        return [(event_id, job_events.decode(fields)) for event_id, fields in found]

    # ---- chores --------------------------------------------------------------------------------

    @property
    def cache(self) -> ResultCache:
        """What the keys of cached results are made of."""
        return ResultCache(self.redis, self._keys, self._settings)

    @property
    def outbox(self) -> Outbox:
        """Webhooks to deliver."""
        return Outbox(self.redis, self._keys)

    async def try_acquire(self, maintenance_lock: str, for_s: float) -> bool:
        """Whether this is for us to do now; nobody else is told so within for_s."""
        with redis_errors():
            return bool(
                await self.redis.set(
                    self._keys.maintenance_lock(maintenance_lock), "1", nx=True, px=int(for_s * 1000)
                )
            )

    async def files_due(self, at_most: int = 64) -> list[str]:
        """Ended jobs whose files shall go."""
        with redis_errors():
            now_us = await clock_us(self.redis)
            due = await self.redis.zrangebyscore(self._keys.expiring, 0, now_us, start=0, num=at_most)
        return cast(list[str], due)

    async def expire_files(self, job_id: str) -> None:
        """From now on the job has no files, and nobody copies them. Raises NotFound."""
        keys = self._keys

        async def decide(pipe: Pipeline) -> None:
            job = await self._read(pipe, job_id)
            group = await self._coalesced_group(pipe, job)
            begin(pipe)
            self._transitions.files_expired(pipe, job, group)

        await transact(self.redis, [keys.job(job_id)], decide)

    async def files_swept(self, job_id: str) -> None:
        """They are gone."""
        with redis_errors():
            await self.redis.zrem(self._keys.expiring, job_id)

    async def unknown(self, job_ids: Sequence[str]) -> list[str]:
        """Those among the ids that no record is kept of."""
        with redis_errors():
            async with self.redis.pipeline(transaction=False) as pipe:
                for job_id in job_ids:
                    pipe.exists(self._keys.job(job_id))
                known = await pipe.execute()
        return [job_id for job_id, there in zip(job_ids, known, strict=True) if not there]

    # ---- workers -------------------------------------------------------------------------------

    async def claim(self, free: Mapping[str, int]) -> Claim | None:
        """The longest waiting job among the models with free slots, now under a lease; None: no work."""
        models = [model for model, slots in free.items() if slots > 0]
        for _ in range(CLAIM_ROUNDS if models else 0):
            with redis_errors():
                async with self.redis.pipeline(transaction=False) as pipe:
                    for model in models:
                        pipe.zrange(self._keys.pending_of(model), 0, HEADS - 1, withscores=True)
                    heads = await pipe.execute()
            waiting = sorted(
                (score, job_id, model)
                for model, found in zip(models, heads, strict=True)
                for job_id, score in found
            )
            for _, job_id, model in waiting:
                claim = await self._claim_one(job_id, model)
                if claim is not None:
                    return claim
            if not waiting:
                break
        return None

    async def _claim_one(self, job_id: str, queue: str) -> Claim | None:
        """The claim, or None when somebody was faster. Watches the hash alone: pending moves all the time."""
        keys = self._keys

        async def decide(pipe: Pipeline) -> Claim | None:
            fields = await get_hash(pipe, keys.job(job_id))
            job = job_from(job_id, fields) if fields.get("state") == JobState.queued else None
            now = (
                0.0 if job is None else float(await pipe.hget(keys.fair_queue(job.request.model), "v") or 0.0)
            )
            running = now if job is None else virtual_time_at(job.queue_score, job.request.priority)
            now_us = await clock_us(pipe)
            begin(pipe)
            if job is None or job.queue != queue:
                self._transitions.dequeue(pipe, job_id, queue)  # or it would be looked at for ever
                return None
            return Claim(self._transitions.claim(pipe, job, now_us, max(now, running)))

        return await transact(self.redis, [keys.job(job_id)], decide)

    async def heartbeat(
        self, claim: Claim, *, step: int = 0, steps: int = 0, pending_events: Sequence[job_events.Event] = ()
    ) -> bool:
        """Renew the lease, note how far it is, publish news; True when the job shall be cancelled.

        Raises Stale.
        """
        keys, job_id = self._keys, claim.job.id

        async def decide(pipe: Pipeline) -> bool:
            job = await self._read_mine(pipe, claim)
            now_us = await clock_us(pipe)
            begin(pipe)
            self._transitions.renew(pipe, job, now_us, step=step, steps=steps, pending_events=pending_events)
            return job.cancel_requested

        return await transact(self.redis, [keys.job(job_id)], decide)

    async def complete(self, claim: Claim, artifacts: Sequence[StoredArtifact], generation_s: float) -> Job:
        """The ended job: completed with these files, or cancelled where that was asked for before."""

        def finish(pipe: Pipeline, job: Job, now_us: int, group: CoalescedGroup) -> Job:
            if job.cancel_requested:
                return self._transitions.end(pipe, job, JobState.cancelled, now_us, group)
            done = replace(job, artifacts=tuple(artifacts), generation_s=generation_s)
            if job.cached_from is None:
                self._throughput.record_duration(pipe, job.request.model, generation_s)
            return self._transitions.end(pipe, done, JobState.completed, now_us, group)

        return await self._finish(claim, finish)

    async def fail(self, claim: Claim, error: JobError, *, fails_followers: bool = True) -> Job:
        """The ended job: failed for this reason, or cancelled where that was asked for before.

        alike: an identical request would fail the same way, so those that wait for this one do.
        """

        def finish(pipe: Pipeline, job: Job, now_us: int, group: CoalescedGroup) -> Job:
            if job.cancel_requested:
                return self._transitions.end(pipe, job, JobState.cancelled, now_us, group)
            failed = replace(job, error=error)
            return self._transitions.end(
                pipe, failed, JobState.failed, now_us, group, fails_followers=fails_followers
            )

        return await self._finish(claim, finish)

    async def cancelled(self, claim: Claim) -> Job:
        """The ended job, after its worker has stopped."""

        def finish(pipe: Pipeline, job: Job, now_us: int, group: CoalescedGroup) -> Job:
            return self._transitions.end(pipe, job, JobState.cancelled, now_us, group)

        return await self._finish(claim, finish)

    async def requeue(
        self,
        claim: Claim,
        error: JobError,
        *,
        counted: bool = True,
        resume_point: ResumePoint | None = None,
        fails_followers: bool = True,
    ) -> Job:
        """The job, waiting again at its old place; or failed for `error` at max_attempts.

        counted: this attempt counts towards max_attempts (a draining worker's does not).
        handover: what the next attempt goes on from; it stays so until an attempt is counted.
        alike: see `fail`.
        """

        def finish(pipe: Pipeline, job: Job, now_us: int, group: CoalescedGroup) -> Job:
            return self._transitions.release(
                pipe,
                job,
                error,
                now_us,
                counted=counted,
                resume_point=resume_point,
                group=group,
                fails_followers=fails_followers,
            )

        return await self._finish(claim, finish, already=JobState.queued)

    async def reap(self, at_most: int = 64) -> list[Job]:
        """Jobs whose lease ran out, as they stand now: waiting again, failed, or cancelled."""
        with redis_errors():
            now_us = await clock_us(self.redis)
            expired = cast(
                list[str],
                await self.redis.zrangebyscore(self._keys.running, 0, now_us, start=0, num=at_most),
            )
        reaped = [await self._reap_one(job_id) for job_id in expired]
        return [job for job in reaped if job is not None]

    async def _reap_one(self, job_id: str) -> Job | None:
        keys = self._keys

        async def decide(pipe: Pipeline) -> Job | None:
            fields = await get_hash(pipe, keys.job(job_id))
            now_us = await clock_us(pipe)
            # the lease in the hash is the watched one: a heartbeat since makes us look again
            if fields.get("state") != JobState.processing or int(fields["lease_us"]) > now_us:
                return None
            job = job_from(job_id, fields)
            error = JobError("internal", WORKER_LOST.format(failures=job.failures + 1))
            group = await self._coalesced_group(pipe, job)
            begin(pipe)
            return self._transitions.release(pipe, job, error, now_us, counted=True, group=group)

        return await transact(self.redis, [keys.job(job_id)], decide)

    # ---- parts of a transaction ----------------------------------------------------------------

    async def _finish(self, claim: Claim, finish: Finish, already: JobState | None = None) -> Job:
        """Leave `processing` under the fence.

        A job that has ended under our attempt is returned as it is: that was our own write whose answer
        was lost, or the reaper's. The same goes for the state `ours`.
        """

        async def decide(pipe: Pipeline) -> Job:
            job = await self._read_attempted(pipe, claim)
            if job.attempt == claim.attempt and (job.state.ended or job.state is already):
                return job
            _check_fence(job, claim)
            group = await self._coalesced_group(pipe, job)
            now_us = await clock_us(pipe)
            begin(pipe)
            return finish(pipe, job, now_us, group)

        return await transact(self.redis, [self._keys.job(claim.job.id)], decide)

    async def _coalesced_group(self, pipe: Pipeline, job: Job) -> CoalescedGroup:
        """Who waits for this job's files; all of it is watched."""
        if job.cache_key is None:
            return NO_GROUP
        keys = self._keys
        await pipe.watch(keys.cache_key(job.cache_key), keys.followers(job.id))
        is_leader = await pipe.get(keys.cache_key(job.cache_key)) == job.id
        ids = cast(list[str], await pipe.zrange(keys.followers(job.id), 0, -1))
        if ids:
            await pipe.watch(*(keys.job(follower) for follower in ids))
        return CoalescedGroup(is_leader, tuple([await self._read(pipe, follower) for follower in ids]))

    async def _read(self, pipe: Pipeline, job_id: str) -> Job:
        return _known(job_id, await get_hash(pipe, self._keys.job(job_id)))

    async def _read_mine(self, pipe: Pipeline, claim: Claim) -> Job:
        """The job under this claim's fence. Raises Stale."""
        job = await self._read_attempted(pipe, claim)
        _check_fence(job, claim)
        return job

    async def _read_attempted(self, pipe: Pipeline, claim: Claim) -> Job:
        """The job, if it was not deleted meanwhile. Raises Stale."""
        try:
            return await self._read(pipe, claim.job.id)
        except NotFound:
            raise StaleClaim(claim.job.id) from None


def _check_fence(job: Job, claim: Claim) -> None:
    if job.state is not JobState.processing or job.attempt != claim.attempt:
        raise StaleClaim(f"{job.id}: {job.state.value}, attempt {job.attempt}, not {claim.attempt}")


def _known(job_id: str, fields: Mapping[str, str]) -> Job:
    if not fields:
        raise NotFound(NO_SUCH_JOB)
    return job_from(job_id, fields)
