"""How often a caller may call, and how many calls run at once; counted in Valkey for all ingress replicas.

Why not a library: docs/decisions/0007-rate-limits.md.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from enum import StrEnum

from redis.asyncio import Redis

from deployments.protocol.errors import Overloaded, RateLimited
from serve_app.redis.transactions import StoreUnreachable, redis_errors
from serve_app.settings import Settings

WINDOW_S = 60
SLOT_LEASE_S = 900.0  # a call whose replica died holds its slot no longer; longer than any call may take


class CallClass(StrEnum):
    """What is counted apart."""

    submit = "submit"  # asks for pictures
    read = "read"  # everything else of a known caller
    auth = "auth"  # tries to become one


class RateLimiter:
    """Windows of a minute that begin with a caller's first call; the server's clock ends them."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self._redis = redis  # made by transaction.connect
        self._prefix = settings.redis_prefix
        self._max_calls = settings.max_concurrent_calls
        self._limits = {
            CallClass.submit: settings.submits_per_minute,
            CallClass.read: settings.reads_per_minute,
            CallClass.auth: settings.logins_per_minute,
        }

    async def take(self, call_class: CallClass, who: str) -> None:
        """Count one call of this owner (auth: of this address). Raises RateLimited past the limit."""
        limit, key = self._limits[call_class], self._window(call_class, who)
        with redis_errors():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.set(key, 0, ex=WINDOW_S, nx=True)
                pipe.incr(key)
                pipe.pttl(key)
                _, count, left_ms = await pipe.execute()
        if count > limit:
            raise RateLimited(
                f"over {limit} {call_class.value} calls a minute; wait and call less often",
                retry_after_s=max(left_ms, 1) / 1000,
            )

    @asynccontextmanager
    async def slot(self) -> AsyncGenerator[None]:
        """Room for one call that asks for pictures, among those of all callers on all replicas.

        Raises Overloaded when there is none. Leases use this machine's clock: they only need to end.
        """
        key, member, now = f"{self._prefix}calls", secrets.token_hex(8), time.time()
        with redis_errors():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.zremrangebyscore(key, 0, now)
                pipe.zadd(key, {member: now + SLOT_LEASE_S})
                pipe.zcard(key)
                pipe.expire(key, int(SLOT_LEASE_S))
                _, _, taken, _ = await pipe.execute()
        try:
            if taken > self._max_calls:
                raise Overloaded(
                    f"{self._max_calls} calls are being answered, which is the limit; try again",
                    retry_after_s=2.0,
                )
            yield
        finally:
            await self._give_back(key, member)

    async def _give_back(self, key: str, member: str) -> None:
        try:
            with redis_errors():
                await self._redis.zrem(key, member)
        except StoreUnreachable:
            pass  # its lease ends it; the call's own answer matters more

    def _window(self, call_class: CallClass, who: str) -> str:
        """STRING: calls in this window. An address is hashed: books need not tell who came from where."""
        name = hashlib.sha256(who.encode()).hexdigest()[:32] if call_class is CallClass.auth else who
        return f"{self._prefix}rate:{call_class.value}:{name}"
