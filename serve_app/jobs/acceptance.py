"""Accepting a job: what it is held against, its place in the queue, and the write that makes it durable."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from deployments.protocol.errors import Conflict, Overloaded, RateLimited
from deployments.protocol.limits import Correction
from deployments.protocol.request import FittedRequest
from serve_app.admission import quota
from serve_app.jobs.job import Job, JobState, Once, Terms
from serve_app.jobs.pace import Paces
from serve_app.jobs.record import FIRST_USE, Keys, job_from
from serve_app.jobs.transitions import Place, Transitions, digest, flow_of
from serve_app.jobs.turns import next_turn
from serve_app.settings import Settings
from serve_app.transaction import begin, clock_us, hash_of, transact


class Acceptance:
    """The store's door. One for each process."""

    def __init__(
        self, redis: Redis, keys: Keys, settings: Settings, transitions: Transitions, paces: Paces
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._settings = settings
        self._transitions = transitions
        self._paces = paces
        self._accepting = asyncio.Lock()  # own accepts would only make each other's WATCH fail

    async def accept(
        self,
        job_id: str,
        owner: str,
        request: FittedRequest,
        warnings: tuple[Correction, ...],
        terms: Terms,
    ) -> Job:
        """See JobStore.accept."""
        keys = self._keys

        async def decide(pipe: Pipeline) -> Job:
            known = await hash_of(pipe, keys.job(job_id))
            if known:
                return job_from(job_id, known)
            if terms.once is not None and (first := await self._first_use(pipe, owner, terms.once)):
                return first
            place = await self._place(pipe, owner, request, terms)
            if place.leader is None and place.twin is None:
                await self._check_room(pipe, request.model, place.position, terms.max_wait_s)
            if await pipe.scard(keys.active(owner)) >= self._settings.max_active_per_owner:
                raise RateLimited(
                    f"you have {self._settings.max_active_per_owner} jobs waiting or running, which is "
                    "the limit; wait for one to end or cancel one",
                    retry_after_s=5.0,
                )
            now_us = await clock_us(pipe)
            charge, old = None, list[str]()
            if terms.images_per_day is not None:
                used = await hash_of(pipe, keys.quota(owner))
                charge = quota.reserve(terms.images_per_day, used, request.num_images, now_us)
                old = quota.old_days(used, now_us)
            begin(pipe)
            if old:
                pipe.hdel(keys.quota(owner), *old)
            return self._transitions.accept(
                pipe, job_id, owner, request, warnings, now_us, terms=terms, place=place, charge=charge
            )

        # not keys.pending, which moves all the time: other processes may pass max_pending by a job each
        watch = [keys.job(job_id), keys.active(owner)]
        if terms.once is not None:
            watch.append(keys.once(owner, digest(terms.once.key)))
        if terms.same is not None:
            watch.append(keys.same(terms.same))
        if terms.images_per_day is not None:
            watch.append(keys.quota(owner))
        async with self._accepting:
            return await transact(self._redis, watch, decide)

    async def _first_use(self, pipe: Pipeline, owner: str, once: Once) -> Job | None:
        """The job that came with this key before, if it is still there. Raises Conflict."""
        used = await pipe.get(self._keys.once(owner, digest(once.key)))
        if used is None:
            return None
        first = FIRST_USE.validate_json(used)
        if first.digest != once.digest:
            raise Conflict(
                "this Idempotency-Key came with another request before; a new request needs a new key",
                param="Idempotency-Key",
            )
        fields = await hash_of(pipe, self._keys.job(first.job))
        return job_from(first.job, fields) if fields else None

    async def _place(self, pipe: Pipeline, owner: str, request: FittedRequest, terms: Terms) -> Place:
        """Where a job that comes now goes."""
        keys, model = self._keys, request.model
        flow = flow_of(owner, request.priority)
        known = await pipe.hmget(keys.turns(model), ["v", flow])
        now, used_up = (float(value or 0.0) for value in known)
        arrival = int(await pipe.get(keys.arrivals) or 0)
        nobody = await self._nobody_waits(pipe, model)
        turn = next_turn(now, 0.0 if nobody else used_up, arrival, request.priority)
        ahead = 0 if nobody else await pipe.zcount(keys.pending_of(model), "-inf", f"({turn.score!r}")
        place = Place(turn, now, ahead + 1, first=nobody)
        other = await self._identical(pipe, terms.same)
        if other is None or other.cancel_requested or other.files_expired:
            return place
        if other.state is JobState.completed:
            return replace(place, position=1, twin=other.id)
        return place if other.state.ended else replace(place, leader=other.id)

    async def _nobody_waits(self, pipe: Pipeline, model: str) -> bool:
        """Whether this queue is empty; then it is watched, as the first to come begins its turns anew."""
        queue = self._keys.pending_of(model)
        if await pipe.zcard(queue):
            return False
        await pipe.watch(queue)
        return not await pipe.zcard(queue)

    async def _identical(self, pipe: Pipeline, same: str | None) -> Job | None:
        """The job that answers this cache key; watched, so that it is so when we write."""
        if same is None:
            return None
        other_id = cast(str | None, await pipe.get(self._keys.same(same)))
        if other_id is None:
            return None
        await pipe.watch(self._keys.job(other_id))
        fields = await hash_of(pipe, self._keys.job(other_id))
        return job_from(other_id, fields) if fields else None

    async def _check_room(self, pipe: Pipeline, model: str, position: int, max_wait_s: float | None) -> None:
        """Raises Overloaded when the queue is full, or too long for this model."""
        if await pipe.zcard(self._keys.pending) >= self._settings.max_pending:
            raise Overloaded(
                f"{self._settings.max_pending} jobs are waiting, which is the limit; try again later",
                retry_after_s=10.0,
            )
        wait_s = None if max_wait_s is None else (await self._paces.read(pipe, model)).starts_in_s(position)
        if max_wait_s is not None and wait_s is not None and wait_s > max_wait_s:
            raise Overloaded(
                f"a new job of {model} would wait about {wait_s:.0f} s, and {max_wait_s:.0f} s is the limit; "
                "try again later",
                retry_after_s=max(1.0, wait_s - max_wait_s),
            )
