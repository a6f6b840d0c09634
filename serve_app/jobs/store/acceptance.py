"""Accepting a job: the limits it must meet, its place in the queue, and the write that makes it durable."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from deployments.protocol.errors import Conflict, Overloaded, RateLimited
from serve_app.admission import quota
from serve_app.jobs.job import IdempotencyKey, Job, JobState, NewJob
from serve_app.jobs.store.fair_queue import assign_tag, flow_of
from serve_app.jobs.store.key_names import Keys, key_digest
from serve_app.jobs.store.record import IDEMPOTENCY_RECORD, job_from
from serve_app.jobs.store.throughput import ThroughputStats
from serve_app.jobs.store.transitions import Placement, Transitions
from serve_app.redis.transactions import begin, clock_us, get_hash, transact
from serve_app.settings import Settings


class Acceptance:
    """Decides whether and where a new job is queued. One for each process."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        settings: Settings,
        transitions: Transitions,
        throughput: ThroughputStats,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._settings = settings
        self._transitions = transitions
        self._throughput = throughput
        self._accepting = asyncio.Lock()  # accepts of one process would only break each other's WATCH

    async def accept(self, new: NewJob) -> Job:
        """See JobStore.accept."""
        async with self._accepting:
            return await transact(self._redis, self._watched(new), partial(self._decide, new))

    def _watched(self, new: NewJob) -> list[str]:
        """Keys that must not change between reading and writing.

        Not keys.pending, which changes all the time: concurrent processes may exceed max_pending by a job
        each.
        """
        keys, options = self._keys, new.options
        watched = [keys.job(new.id), keys.active(new.owner)]
        if options.idempotency_key is not None:
            watched.append(keys.idempotency_key(new.owner, key_digest(options.idempotency_key.key)))
        if options.cache_key is not None:
            watched.append(keys.cache_key(options.cache_key))
        if options.images_per_day is not None:
            watched.append(keys.quota(new.owner))
        return watched

    async def _decide(self, new: NewJob, pipe: Pipeline) -> Job:
        keys, options = self._keys, new.options
        known = await get_hash(pipe, keys.job(new.id))
        if known:
            return job_from(new.id, known)
        if options.idempotency_key is not None:
            first = await self._job_of_idempotency_key(pipe, new.owner, options.idempotency_key)
            if first is not None:
                return first
        placement = await self._placement(pipe, new)
        if placement.needs_model:
            await self._check_capacity(pipe, new.request.model, placement.position, options.max_wait_s)
        await self._check_active(pipe, new.owner)
        now_us = await clock_us(pipe)
        charge, old_days = None, list[str]()
        if options.images_per_day is not None:
            used = await get_hash(pipe, keys.quota(new.owner))
            charge = quota.reserve(options.images_per_day, used, new.request.num_images, now_us)
            old_days = quota.old_days(used, now_us)
        begin(pipe)
        if old_days:
            pipe.hdel(keys.quota(new.owner), *old_days)
        return self._transitions.accept(pipe, new, now_us, placement, charge)

    async def _job_of_idempotency_key(self, pipe: Pipeline, owner: str, key: IdempotencyKey) -> Job | None:
        """The job that was first submitted with this key, if it still exists. Raises Conflict."""
        used = await pipe.get(self._keys.idempotency_key(owner, key_digest(key.key)))
        if used is None:
            return None
        first = IDEMPOTENCY_RECORD.validate_json(used)
        if first.digest != key.digest:
            raise Conflict(
                "this Idempotency-Key came with another request before; a new request needs a new key",
                param="Idempotency-Key",
            )
        fields = await get_hash(pipe, self._keys.job(first.job))
        return job_from(first.job, fields) if fields else None

    async def _placement(self, pipe: Pipeline, new: NewJob) -> Placement:
        """Where a job that arrives now goes."""
        keys, model, priority = self._keys, new.request.model, new.request.priority
        stored = await pipe.hmget(keys.fair_queue(model), ["v", flow_of(new.owner, priority)])
        virtual_time, finish_tag = (float(value or 0.0) for value in stored)
        arrival = int(await pipe.get(keys.arrivals) or 0)
        is_empty = await self._queue_is_empty(pipe, model)
        tag = assign_tag(virtual_time, 0.0 if is_empty else finish_tag, arrival, priority)
        ahead = 0 if is_empty else await pipe.zcount(keys.pending_of(model), "-inf", f"({tag.score!r}")
        placement = Placement(tag, virtual_time, ahead + 1, queue_is_empty=is_empty)
        other = await self._job_of_cache_key(pipe, new.options.cache_key)
        if other is None or other.cancel_requested or other.files_expired:
            return placement
        if other.state is JobState.completed:
            return replace(placement, position=1, cached_from=other.id)
        return placement if other.state.ended else replace(placement, leader=other.id)

    async def _queue_is_empty(self, pipe: Pipeline, model: str) -> bool:
        """Whether no job waits for the model; then the queue is watched, as the first one resets its tags."""
        queue = self._keys.pending_of(model)
        if await pipe.zcard(queue):
            return False
        await pipe.watch(queue)
        return not await pipe.zcard(queue)

    async def _job_of_cache_key(self, pipe: Pipeline, cache_key: str | None) -> Job | None:
        """The job that answers this cache key; watched, so that it still does when we write."""
        if cache_key is None:
            return None
        other_id = cast(str | None, await pipe.get(self._keys.cache_key(cache_key)))
        if other_id is None:
            return None
        await pipe.watch(self._keys.job(other_id))
        fields = await get_hash(pipe, self._keys.job(other_id))
        return job_from(other_id, fields) if fields else None

    async def _check_capacity(
        self, pipe: Pipeline, model: str, position: int, max_wait_s: float | None
    ) -> None:
        """Raises Overloaded when the queue is full, or longer than this model allows."""
        if await pipe.zcard(self._keys.pending) >= self._settings.max_pending:
            raise Overloaded(
                f"{self._settings.max_pending} jobs are waiting, which is the limit; try again later",
                retry_after_s=10.0,
            )
        if max_wait_s is None:
            return
        wait_s = (await self._throughput.read(pipe, model)).starts_in_s(position)
        if wait_s is not None and wait_s > max_wait_s:
            raise Overloaded(
                f"a new job of {model} would wait about {wait_s:.0f} s, and {max_wait_s:.0f} s is the limit; "
                "try again later",
                retry_after_s=max(1.0, wait_s - max_wait_s),
            )

    async def _check_active(self, pipe: Pipeline, owner: str) -> None:
        """Raises RateLimited when the owner has as many unfinished jobs as one may have."""
        if await pipe.scard(self._keys.active(owner)) >= self._settings.max_active_per_owner:
            raise RateLimited(
                f"you have {self._settings.max_active_per_owner} jobs waiting or running, which is "
                "the limit; wait for one to end or cancel one",
                retry_after_s=5.0,
            )
