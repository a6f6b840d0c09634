"""Webhooks whose time has come: taken by one courier at a time, kept until they are delivered or given up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from serve_app.jobs.job import Job
from serve_app.jobs.store.record import Keys, job_from
from serve_app.redis.transactions import begin, redis_errors, transact

AT_MOST = 16  # taken at once
HOLD_S = 30.0  # a courier that is silent for so long is dead, and another one delivers


@dataclass(frozen=True, slots=True)
class OutboxEntry:
    """An ended job whose webhook shall be told now."""

    job: Job
    tries: int  # this one included


class Outbox:
    """A parcel enters it in the write that ends its job, so none is lost whoever dies."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    async def claim_due(self) -> list[OutboxEntry]:
        """Parcels that are due, held for HOLD_S. Whoever dies with one leaves it to others."""
        with redis_errors():
            now_us = await self._now_us(self._redis)
            due = await self._redis.zrangebyscore(self._keys.outbox, 0, now_us, start=0, num=AT_MOST)
        taken = [await self._claim_one(job_id) for job_id in cast(list[str], due)]
        return [entry for entry in taken if entry is not None]

    async def _claim_one(self, job_id: str) -> OutboxEntry | None:
        keys = self._keys

        async def decide(pipe: Pipeline) -> OutboxEntry | None:
            fields = cast(dict[str, str], await pipe.hgetall(keys.job(job_id)))
            due_us = await pipe.zscore(keys.outbox, job_id)
            now_us = await self._now_us(pipe)
            if due_us is None or due_us > now_us:
                return None
            begin(pipe)
            if not fields:  # forgotten meanwhile
                pipe.zrem(keys.outbox, job_id)
                return None
            tries = int(fields.get("webhook_tries", 0)) + 1
            pipe.hset(keys.job(job_id), "webhook_tries", str(tries))  # watched: one courier succeeds
            pipe.zadd(keys.outbox, {job_id: now_us + int(HOLD_S * 1e6)})
            return OutboxEntry(job_from(job_id, fields), tries)

        return await transact(self._redis, [keys.job(job_id)], decide)

    async def done(self, entry: OutboxEntry) -> None:
        """It was delivered, or never will be."""
        with redis_errors():
            await self._redis.zrem(self._keys.outbox, entry.job.id)

    async def retry_later(self, entry: OutboxEntry, in_s: float) -> None:
        """It was not delivered; try again later."""
        with redis_errors():
            now_us = await self._now_us(self._redis)
            # xx: its owner may have deleted the job meanwhile
            await self._redis.zadd(self._keys.outbox, {entry.job.id: now_us + int(in_s * 1e6)}, xx=True)

    async def _now_us(self, redis: Redis | Pipeline) -> int:
        seconds, microseconds = await redis.time()
        return int(seconds) * 1_000_000 + int(microseconds)
