"""What the keys of the result cache are made of beside the request: a secret, and each owner's epoch."""

from __future__ import annotations

import secrets
from typing import cast

from redis.asyncio import Redis

from serve_app.jobs.store.record import Keys
from serve_app.redis.transactions import redis_errors
from serve_app.settings import Settings


class ResultCache:
    """Which cache keys there can be. Raises StoreUnreachable when the server cannot be asked."""

    def __init__(self, redis: Redis, keys: Keys, settings: Settings) -> None:
        self._redis = redis  # made by transaction.connect
        self._keys = keys
        # by the time an epoch counts from 0 again, nothing from before is cached any more
        self._epoch_ttl_s = 2 * max(settings.result_ttl_s, settings.record_ttl_s)

    async def secret(self) -> bytes:
        """32 random bytes that all processes of this installation share, and nobody else knows."""
        with redis_errors():
            await self._redis.set(self._keys.secret, secrets.token_hex(32), nx=True)
            return bytes.fromhex(cast(str, await self._redis.get(self._keys.secret)))

    async def epoch(self, owner: str) -> int:
        """How often this owner's cache was emptied of late; a part of every cache key."""
        with redis_errors():
            return int(await self._redis.get(self._keys.epoch(owner)) or 0)

    async def empty(self, owner: str) -> None:
        """From now on the owner's cache keys are other ones."""
        epoch = self._keys.epoch(owner)
        with redis_errors():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.incr(epoch)
                pipe.expire(epoch, self._epoch_ttl_s)
                await pipe.execute()
