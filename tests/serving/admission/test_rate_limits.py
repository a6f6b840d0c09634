"""Calls are counted together by all replicas, without any script on the server."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from deployments.protocol.errors import Overloaded, RateLimited
from serve_app.admission.rate_limits import WINDOW_S, CallClass, RateLimiter
from tests.serving.conftest import MakeSettings
from tests.serving.fakes import keys_without_ttl


async def test_replicas_share_the_limit_and_say_when_to_try_again(
    redis: Redis, make_settings: MakeSettings
) -> None:
    settings = make_settings(submits_per_minute=7)
    replicas = [RateLimiter(redis, settings) for _ in range(3)]

    outcomes = await asyncio.gather(
        *(replicas[n % 3].take(CallClass.submit, "ann") for n in range(20)), return_exceptions=True
    )

    refusals = [outcome for outcome in outcomes if isinstance(outcome, RateLimited)]
    assert len(refusals) == 13
    assert all(0 < (refusal.retry_after_s or 0) <= WINDOW_S for refusal in refusals)


async def test_owners_and_classes_are_counted_apart(redis: Redis, make_settings: MakeSettings) -> None:
    limits = RateLimiter(redis, make_settings(submits_per_minute=1, reads_per_minute=1))

    await limits.take(CallClass.submit, "ann")
    await limits.take(CallClass.read, "ann")
    await limits.take(CallClass.submit, "bob")

    with pytest.raises(RateLimited):
        await limits.take(CallClass.submit, "ann")


async def test_a_window_ends_by_the_servers_clock_however_often_one_knocks(
    redis: Redis, make_settings: MakeSettings
) -> None:
    settings = make_settings(reads_per_minute=1)
    limits = RateLimiter(redis, settings)
    await limits.take(CallClass.read, "ann")
    for _ in range(5):
        with pytest.raises(RateLimited):
            await limits.take(CallClass.read, "ann")

    assert 0 < await redis.ttl(f"{settings.redis_prefix}rate:read:ann") <= WINDOW_S
    await redis.delete(f"{settings.redis_prefix}rate:read:ann")  # the minute is over

    await limits.take(CallClass.read, "ann")


async def test_a_slot_is_given_back_when_a_call_ends_however_it_ends(
    redis: Redis, make_settings: MakeSettings
) -> None:
    settings = make_settings(max_concurrent_calls=2)
    ours, theirs = RateLimiter(redis, settings), RateLimiter(redis, settings)

    async def callers() -> None:
        async with ours.slot(), theirs.slot():
            with pytest.raises(Overloaded):
                await theirs.slot().__aenter__()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await callers()

    async with ours.slot(), theirs.slot():
        pass
    assert await redis.zcard(f"{settings.redis_prefix}calls") == 0


async def test_the_slot_of_a_dead_replica_ends_with_its_lease(
    redis: Redis, make_settings: MakeSettings
) -> None:
    settings = make_settings(max_concurrent_calls=1)
    await redis.zadd(f"{settings.redis_prefix}calls", {"of the dead": 1.0})

    async with RateLimiter(redis, settings).slot():
        pass


async def test_every_count_ends_by_itself(redis: Redis, make_settings: MakeSettings) -> None:
    settings = make_settings()
    limits = RateLimiter(redis, settings)

    await limits.take(CallClass.auth, "192.0.2.1")
    async with limits.slot():
        assert await keys_without_ttl(redis, settings.redis_prefix) == []

    assert not [key async for key in redis.scan_iter(f"{settings.redis_prefix}*") if "192.0.2.1" in key]
