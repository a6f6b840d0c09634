"""Files whose retention time is over, and files without a record, as the store knows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from serve_app.jobs.store.endings import Endings
from serve_app.jobs.store.key_names import Keys
from serve_app.jobs.store.reads import read_group, read_job
from serve_app.redis.transactions import begin, clock_us, redis_errors, transact


class FileExpiry:
    """Says which files are to be removed, and records their removal. Raises StoreUnreachable."""

    def __init__(self, redis: Redis, keys: Keys, endings: Endings) -> None:
        self._redis = redis
        self._keys = keys
        self._endings = endings

    async def due(self, at_most: int = 64) -> list[str]:
        """Ids of ended jobs whose files are to be removed."""
        with redis_errors():
            now_us = await clock_us(self._redis)
            due = await self._redis.zrangebyscore(self._keys.expiring, 0, now_us, start=0, num=at_most)
        return cast(list[str], due)

    async def expire(self, job_id: str) -> None:
        """Record, before the files are removed, that the job has none; none are copied from it any more.

        Raises NotFound.
        """

        async def decide(pipe: Pipeline) -> None:
            job = await read_job(pipe, self._keys, job_id)
            group = await read_group(pipe, self._keys, job)
            begin(pipe)
            self._endings.expire_files(pipe, job, group)

        await transact(self._redis, [self._keys.job(job_id)], decide)

    async def done(self, job_id: str) -> None:
        """Record that the files were removed."""
        with redis_errors():
            await self._redis.zrem(self._keys.expiring, job_id)

    async def without_record(self, job_ids: Sequence[str]) -> list[str]:
        """Those of the ids that have no record."""
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for job_id in job_ids:
                    pipe.exists(self._keys.job(job_id))
                known = await pipe.execute()
        return [job_id for job_id, exists in zip(job_ids, known, strict=True) if not exists]
