"""The inputs of cache keys that the store holds: the installation's secret, and each owner's epoch."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from typing import cast

from redis.asyncio import Redis

from deployments.protocol.request import ResolvedRequest
from serve_app.jobs.store.cache_keys import compute_cache_key
from serve_app.jobs.store.key_names import Keys
from serve_app.redis.transactions import redis_errors
from serve_app.settings import Settings


class ResultCache:
    """Computes the cache keys of owners, and invalidates them. Raises StoreUnreachable."""

    def __init__(self, redis: Redis, keys: Keys, settings: Settings) -> None:
        self._redis = redis  # made by serve_app.redis.transactions.connect
        self._keys = keys
        self._secret: bytes | None = None  # read once
        # when an epoch starts from 0 again, no cached result from before exists any more
        self._epoch_ttl_s = 2 * max(settings.result_ttl_s, settings.record_ttl_s)

    async def secret(self) -> bytes:
        """32 random bytes that all processes of this installation share."""
        if self._secret is None:
            with redis_errors():
                await self._redis.set(self._keys.secret, secrets.token_hex(32), nx=True)
                self._secret = bytes.fromhex(cast(str, await self._redis.get(self._keys.secret)))
        return self._secret

    async def key(self, owner: str, request: ResolvedRequest, models: Mapping[str, str]) -> str:
        """The cache key of a request with its input images; see compute_cache_key."""
        secret = await self.secret()
        epoch = await self.epoch(owner)
        return await asyncio.to_thread(compute_cache_key, secret, owner, epoch, request, models)

    async def epoch(self, owner: str) -> int:
        """How often this owner's cache was emptied; part of every cache key."""
        with redis_errors():
            return int(await self._redis.get(self._keys.epoch(owner)) or 0)

    async def empty(self, owner: str) -> None:
        """Start a new epoch: no later request of this owner is answered by an earlier result."""
        epoch = self._keys.epoch(owner)
        with redis_errors():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.incr(epoch)
                pipe.expire(epoch, self._epoch_ttl_s)
                await pipe.execute()
