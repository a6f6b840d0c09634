"""Webhooks that are due: held by one deliverer at a time, kept until they are delivered or given up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from serve_app.jobs.job import Job
from serve_app.jobs.store.key_names import Keys
from serve_app.jobs.store.record import job_from
from serve_app.redis.transactions import begin, clock_us, get_hash, redis_errors, transact

AT_MOST = 16  # claimed at once
HOLD_S = 30.0  # a deliverer that has not answered for this long is presumed dead, and another one delivers


@dataclass(frozen=True, slots=True)
class OutboxEntry:
    """An ended job whose webhook is due."""

    job: Job
    tries: int  # including this one


class Outbox:
    """An entry is written in the transaction that ends its job, so no crash can lose it."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    async def claim_due(self) -> list[OutboxEntry]:
        """Entries that are due, held for HOLD_S; those of a dead deliverer become due again after it."""
        with redis_errors():
            now_us = await clock_us(self._redis)
            due = await self._redis.zrangebyscore(self._keys.outbox, 0, now_us, start=0, num=AT_MOST)
        claimed = [await self._claim_one(job_id) for job_id in cast(list[str], due)]
        return [entry for entry in claimed if entry is not None]

    async def _claim_one(self, job_id: str) -> OutboxEntry | None:
        keys = self._keys

        async def decide(pipe: Pipeline) -> OutboxEntry | None:
            fields = await get_hash(pipe, keys.job(job_id))
            due_us = await pipe.zscore(keys.outbox, job_id)
            now_us = await clock_us(pipe)
            if due_us is None or due_us > now_us:
                return None
            begin(pipe)
            if not fields:  # deleted meanwhile
                pipe.zrem(keys.outbox, job_id)
                return None
            tries = int(fields.get("webhook_tries", 0)) + 1
            pipe.hset(keys.job(job_id), "webhook_tries", str(tries))  # watched: only one deliverer succeeds
            pipe.zadd(keys.outbox, {job_id: now_us + int(HOLD_S * 1e6)})
            return OutboxEntry(job_from(job_id, fields), tries)

        return await transact(self._redis, [keys.job(job_id)], decide)

    async def done(self, entry: OutboxEntry) -> None:
        """Remove an entry that was delivered or given up."""
        with redis_errors():
            await self._redis.zrem(self._keys.outbox, entry.job.id)

    async def retry_later(self, entry: OutboxEntry, in_s: float) -> None:
        """Make an entry due again in so many seconds."""
        with redis_errors():
            now_us = await clock_us(self._redis)
            # xx: its owner may have deleted the job meanwhile
            await self._redis.zadd(self._keys.outbox, {entry.job.id: now_us + int(in_s * 1e6)}, xx=True)
