"""The durable store of jobs: each is accepted once, run under a lease, and ended once, whatever dies.

The job's hash is the only source of truth; the sorted sets are indexes that change in the same MULTI/EXEC.
Every change is WATCH, check state and attempt, write: no Lua, so the server's ACL can deny scripting.
Leases are measured by the server's clock. Values are JSON.
"""

from __future__ import annotations

import re
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from deployments.protocol.errors import BadRequest, Conflict
from serve_app.jobs import events as job_events
from serve_app.jobs.job import Job, JobState, NewJob
from serve_app.jobs.store.acceptance import Acceptance
from serve_app.jobs.store.clusters import ClusterRecords
from serve_app.jobs.store.file_expiry import FileExpiry
from serve_app.jobs.store.key_names import Keys
from serve_app.jobs.store.leases import Leases
from serve_app.jobs.store.outbox import Outbox
from serve_app.jobs.store.owner_index import ALL_JOBS, JobFilter, JobPage, OwnerIndex
from serve_app.jobs.store.reads import existing_job, read_group, read_job
from serve_app.jobs.store.result_cache import ResultCache
from serve_app.jobs.store.throughput import ThroughputStats
from serve_app.jobs.store.transitions import Transitions
from serve_app.jobs.store.usage_totals import UsageTotals
from serve_app.jobs.store.wakeups import Wakeups
from serve_app.redis.transactions import begin, clock_us, get_hash, redis_errors, transact
from serve_app.settings import Settings

FROM_START = "0-0"  # before every event id


class JobStore:
    """What callers may do with jobs, and the parts for workers. Raises StoreUnreachable.

    leases: claiming, renewing and ending attempts.  throughput: capacity and estimates.
    clusters: the Ray clusters that share the store.
    usage: totals of what jobs used.
    cache: cache keys of results.  outbox: webhooks to deliver.  file_expiry: files to remove.
    """

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self.redis = redis  # made by serve_app.redis.transactions.connect
        self._keys = keys = Keys(settings.redis_prefix)
        self._transitions = transitions = Transitions(keys, settings)
        self.throughput = ThroughputStats(redis, keys)
        self.clusters = ClusterRecords(redis, keys)
        self.leases = Leases(redis, keys, transitions, self.throughput)
        self.cache = ResultCache(redis, keys, settings)
        self.usage = UsageTotals(redis, keys)
        self.outbox = Outbox(redis, keys)
        self.file_expiry = FileExpiry(redis, keys, transitions.endings)
        self._acceptance = Acceptance(redis, keys, settings, transitions, self.throughput)

    def work_wakeups(self) -> Wakeups:
        """Wakes for NEW_WORK, and for the id of a running job that is to be cancelled."""
        return Wakeups(self.redis, self._keys.work_channel)

    def event_wakeups(self) -> Wakeups:
        """Wakes for the id of a job that has a new event."""
        return Wakeups(self.redis, self._keys.events_channel)

    async def ping(self) -> None:
        """Raises StoreUnreachable unless the server answers."""
        with redis_errors():
            await self.redis.ping()

    async def try_acquire(self, name: str, for_s: float) -> bool:
        """Whether this process has the maintenance task `name` now; no other gets it within for_s."""
        with redis_errors():
            lock = self._keys.maintenance_lock(name)
            return bool(await self.redis.set(lock, "1", nx=True, px=int(for_s * 1000)))

    async def accept(self, new: NewJob) -> Job:
        """The queued job, durable now. The same id or Idempotency-Key again returns the existing job.

        A request equal to one that has completed copies its files; equal to one in progress, it waits for
        them.
        Raises Overloaded past max_pending (concurrent processes may exceed it by a job each) and
        max_wait_s, RateLimited past max_active_per_owner, QuotaExceeded past images_per_day, Conflict when
        the key was used with another body.
        """
        return await self._acceptance.accept(new)

    async def get(self, job_id: str) -> Job:
        """The job as it is stored. Raises NotFound."""
        with redis_errors():
            fields = await get_hash(self.redis, self._keys.job(job_id))
        return existing_job(job_id, fields)

    async def position(self, job: Job) -> int | None:
        """1: next to be claimed among its model's jobs; None when it does not wait.

        A job that waits for an identical one has that one's position. Jobs of owners with fewer waiting
        may still be queued before it, so the number can also grow.
        """
        with redis_errors():
            rank = await self.redis.zrank(self._keys.pending_of(job.queue), job.leader or job.id)
        return None if rank is None else cast(int, rank) + 1

    async def page(
        self,
        owner: str,
        *,
        cursor: str | None = None,
        limit: int = 50,
        where: JobFilter = ALL_JOBS,
    ) -> JobPage:
        """The owner's jobs, newest first. A page may be short and still have a next_cursor.

        Raises BadRequest for a malformed cursor.
        """
        index = OwnerIndex(self.redis, self._keys, owner)
        with redis_errors():
            return await index.page(cursor=cursor, limit=limit, where=where)

    async def cancel(self, job_id: str) -> Job:
        """The job: cancelled if it waited, marked and soon cancelled if it runs, unchanged if it ended."""

        async def decide(pipe: Pipeline) -> Job:
            job = await read_job(pipe, self._keys, job_id)
            if job.state.ended or job.cancel_requested:
                return job
            if job.state is JobState.queued:
                group = await read_group(pipe, self._keys, job)
                now_us = await clock_us(pipe)
                begin(pipe)
                return self._transitions.endings.end(pipe, job, JobState.cancelled, now_us, group)
            begin(pipe)
            return self._transitions.request_cancel(pipe, job)

        return await transact(self.redis, [self._keys.job(job_id)], decide)

    async def delete(self, job_id: str) -> None:
        """Delete an ended job and its events. Raises NotFound, and Conflict while it is active."""

        async def decide(pipe: Pipeline) -> None:
            job = await read_job(pipe, self._keys, job_id)
            if not job.state.ended:
                raise Conflict(f"the job is {job.state.value}; cancel it first")
            group = await read_group(pipe, self._keys, job)
            begin(pipe)
            self._transitions.endings.delete(pipe, job, group)

        await transact(self.redis, [self._keys.job(job_id)], decide)

    async def events(self, job_id: str, after: str = FROM_START) -> list[tuple[str, job_events.Event]]:
        """(event id, event) after the event with id `after`. Raises BadRequest for a malformed id."""
        if not re.fullmatch(r"\d{1,20}-\d{1,20}", after):
            raise BadRequest(f"{after[:64]!r} is not an event id; leave it out to see all events")
        with redis_errors():
            entries = await self.redis.xrange(self._keys.events(job_id), min=f"({after}")
        found = cast(list[tuple[str, dict[str, str]]], entries)
        return [(event_id, job_events.decode(fields)) for event_id, fields in found]
