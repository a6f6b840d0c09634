"""Accepting a job: what it is held against, its place in the queue, and the write that makes it durable."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from deployments.protocol.errors import Conflict, Overloaded, RateLimited
from deployments.protocol.request import ResolvedRequest
from deployments.validation.resolve import Adjustment
from serve_app.admission import quota
from serve_app.jobs.job import IdempotencyKey, Job, JobState, SubmitOptions
from serve_app.jobs.store.fair_queue import assign_tag
from serve_app.jobs.store.record import IDEMPOTENCY_RECORD, Keys, job_from
from serve_app.jobs.store.throughput import ThroughputStats
from serve_app.jobs.store.transitions import Placement, Transitions, digest, flow_field
from serve_app.redis.transactions import begin, clock_us, get_hash, transact
from serve_app.settings import Settings


class Acceptance:
    """The store's door. One for each process."""

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
        self._accepting = asyncio.Lock()  # own accepts would only make each other's WATCH fail

    async def accept(
        self,
        job_id: str,
        owner: str,
        request: ResolvedRequest,
        warnings: tuple[Adjustment, ...],
        options: SubmitOptions,
    ) -> Job:
        """See JobStore.accept."""
        keys = self._keys

        async def decide(pipe: Pipeline) -> Job:
            known = await get_hash(pipe, keys.job(job_id))
            if known:
                return job_from(job_id, known)
            if options.idempotency_key is not None and (
                first := await self._job_of_idempotency_key(pipe, owner, options.idempotency_key)
            ):
                return first
            placement = await self._placement(pipe, owner, request, options)
            if placement.leader is None and placement.cached_from is None:
                await self._check_capacity(pipe, request.model, placement.position, options.max_wait_s)
            if await pipe.scard(keys.active(owner)) >= self._settings.max_active_per_owner:
                raise RateLimited(
                    f"you have {self._settings.max_active_per_owner} jobs waiting or running, which is "
                    "the limit; wait for one to end or cancel one",
                    retry_after_s=5.0,
                )
            now_us = await clock_us(pipe)
            charge, old = None, list[str]()
            if options.images_per_day is not None:
                used = await get_hash(pipe, keys.quota(owner))
                charge = quota.reserve(options.images_per_day, used, request.num_images, now_us)
                old = quota.old_days(used, now_us)
            begin(pipe)
            if old:
                pipe.hdel(keys.quota(owner), *old)
            return self._transitions.accept(
                pipe,
                job_id,
                owner,
                request,
                warnings,
                now_us,
                options=options,
                placement=placement,
                charge=charge,
            )

        # not keys.pending, which moves all the time: other processes may pass max_pending by a job each
        watch = [keys.job(job_id), keys.active(owner)]
        if options.idempotency_key is not None:
            watch.append(keys.idempotency_key(owner, digest(options.idempotency_key.key)))
        if options.cache_key is not None:
            watch.append(keys.cache_key(options.cache_key))
        if options.images_per_day is not None:
            watch.append(keys.quota(owner))
        async with self._accepting:
            return await transact(self._redis, watch, decide)

    async def _job_of_idempotency_key(
        self, pipe: Pipeline, owner: str, idempotency_key: IdempotencyKey
    ) -> Job | None:
        """The job that came with this key before, if it is still there. Raises Conflict."""
        used = await pipe.get(self._keys.idempotency_key(owner, digest(idempotency_key.key)))
        if used is None:
            return None
        first = IDEMPOTENCY_RECORD.validate_json(used)
        if first.digest != idempotency_key.digest:
            raise Conflict(
                "this Idempotency-Key came with another request before; a new request needs a new key",
                param="Idempotency-Key",
            )
        fields = await get_hash(pipe, self._keys.job(first.job))
        return job_from(first.job, fields) if fields else None

    async def _placement(
        self, pipe: Pipeline, owner: str, request: ResolvedRequest, options: SubmitOptions
    ) -> Placement:
        """Where a job that comes now goes."""
        keys, model = self._keys, request.model
        flow = flow_field(owner, request.priority)
        known = await pipe.hmget(keys.fair_queue(model), ["v", flow])
        now, finish_tag = (float(value or 0.0) for value in known)
        arrival = int(await pipe.get(keys.arrivals) or 0)
        is_empty = await self._queue_is_empty(pipe, model)
        queue_score = assign_tag(now, 0.0 if is_empty else finish_tag, arrival, request.priority)
        ahead = (
            0 if is_empty else await pipe.zcount(keys.pending_of(model), "-inf", f"({queue_score.score!r}")
        )
        placement = Placement(queue_score, now, ahead + 1, first=is_empty)
        other = await self._job_of_cache_key(pipe, options.cache_key)
        if other is None or other.cancel_requested or other.files_expired:
            return placement
        if other.state is JobState.completed:
            return replace(placement, position=1, cached_from=other.id)
        return placement if other.state.ended else replace(placement, leader=other.id)

    async def _queue_is_empty(self, pipe: Pipeline, model: str) -> bool:
        """Whether this queue is empty; then it is watched, as the first to come begins its turns anew."""
        queue = self._keys.pending_of(model)
        if await pipe.zcard(queue):
            return False
        await pipe.watch(queue)
        return not await pipe.zcard(queue)

    async def _job_of_cache_key(self, pipe: Pipeline, cache_key: str | None) -> Job | None:
        """The job that answers this cache key; watched, so that it is so when we write."""
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
        """Raises Overloaded when the queue is full, or too long for this model."""
        if await pipe.zcard(self._keys.pending) >= self._settings.max_pending:
            raise Overloaded(
                f"{self._settings.max_pending} jobs are waiting, which is the limit; try again later",
                retry_after_s=10.0,
            )
        wait_s = (
            None if max_wait_s is None else (await self._throughput.read(pipe, model)).starts_in_s(position)
        )
        if max_wait_s is not None and wait_s is not None and wait_s > max_wait_s:
            raise Overloaded(
                f"a new job of {model} would wait about {wait_s:.0f} s, and {max_wait_s:.0f} s is the limit; "
                "try again later",
                retry_after_s=max(1.0, wait_s - max_wait_s),
            )
