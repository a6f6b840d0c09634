"""Rate limits per caller, and a limit of concurrent calls; counted in Valkey for all ingress replicas.

Why no library is used: docs/decisions/0007-rate-limits.md.
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
GUESSES_PER_LOGIN = 10  # wrong keys from one address, over those of one prefix: callers may share an address
SLOT_LEASE_S = 900.0  # after it a dead replica's slot is free again; longer than any call may take


class CallClass(StrEnum):
    """Calls that have a limit of their own."""

    submit = "submit"  # submits a job
    read = "read"  # every other call of an authenticated caller
    auth = "auth"  # log-ins of one key from one address, and wrong keys of one prefix
    guess = "guess"  # all wrong keys from one address


CALLS = {  # in messages
    CallClass.submit: "submit calls",
    CallClass.read: "read calls",
    CallClass.auth: "log-ins or wrong keys of one caller",
    CallClass.guess: "wrong keys from one address",
}


class RateLimiter:
    """Windows of a minute, which begin with a caller's first call and end by the clock of the store."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self._redis = redis  # made by transaction.connect
        self._prefix = settings.redis_prefix
        self._max_calls = settings.max_concurrent_calls
        self._limits = {
            CallClass.submit: settings.submits_per_minute,
            CallClass.read: settings.reads_per_minute,
            CallClass.auth: settings.logins_per_minute,
            CallClass.guess: GUESSES_PER_LOGIN * settings.logins_per_minute,
        }

    async def take(self, call_class: CallClass, who: str) -> None:
        """Count one call of this owner (auth, guess: of this address). Raises RateLimited past the limit."""
        limit, key = self._limits[call_class], self._window(call_class, who)
        with redis_errors():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.set(key, 0, ex=WINDOW_S, nx=True)
                pipe.incr(key)
                pipe.pttl(key)
                _, count, left_ms = await pipe.execute()
        if count > limit:
            raise RateLimited(
                f"over {limit} {CALLS[call_class]} a minute; wait and call less often",
                retry_after_s=max(left_ms, 1) / 1000,
            )

    @asynccontextmanager
    async def slot(self) -> AsyncGenerator[None]:
        """Hold one of the slots for calls that submit jobs; all callers on all replicas share them.

        Raises Overloaded when none is free. Leases use this machine's clock, since they only need to expire.
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
            await self._release(key, member)

    async def _release(self, key: str, member: str) -> None:
        try:
            with redis_errors():
                await self._redis.zrem(key, member)
        except StoreUnreachable:
            pass  # the lease expires by itself; the answer to the call matters more

    def _window(self, call_class: CallClass, who: str) -> str:
        """STRING: number of calls in this window. Addresses are hashed, so that the store contains none."""
        by_address = call_class in (CallClass.auth, CallClass.guess)
        name = hashlib.sha256(who.encode()).hexdigest()[:32] if by_address else who
        return f"{self._prefix}rate:{call_class.value}:{name}"
