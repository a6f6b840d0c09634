"""Optimistic transactions: what happens when another client writes a watched key in between."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from deployments.protocol.errors import Overloaded
from serve_app.redis.transactions import MAX_TRIES, begin, transact, transact_unless_conflict
from serve_app.settings import Settings


class Append:
    """A decision that appends a letter to the text at a key, while another client writes there first."""

    def __init__(self, redis: Redis, key: str, conflicts: int) -> None:
        self.key = key
        self.calls = 0
        self._redis = redis
        self._conflicts = conflicts

    async def __call__(self, pipe: Pipeline) -> str:
        self.calls += 1
        text = f"{await pipe.get(self.key) or ''}a"
        if self.calls <= self._conflicts:
            await self._redis.append(self.key, "b")
        begin(pipe)
        pipe.set(self.key, text)
        return text


async def test_a_decision_is_taken_again_after_a_conflict(redis: Redis, settings: Settings) -> None:
    append = Append(redis, f"{settings.redis_prefix}text", conflicts=2)

    result = await transact(redis, [append.key], append)

    assert (result, await redis.get(append.key), append.calls) == ("bba", "bba", 3)


async def test_endless_conflicts_are_an_overload_error(
    redis: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.redis.transactions.MAX_TRIES", 3)
    append = Append(redis, f"{settings.redis_prefix}text", conflicts=MAX_TRIES)

    with pytest.raises(Overloaded, match="busy"):
        await transact(redis, [append.key], append)

    assert (await redis.get(append.key), append.calls) == ("bbb", 3)


async def test_a_caller_with_something_else_to_try_gets_the_first_conflict_as_none(
    redis: Redis, settings: Settings
) -> None:
    append = Append(redis, f"{settings.redis_prefix}text", conflicts=1)

    first = await transact_unless_conflict(redis, [append.key], append)
    second = await transact_unless_conflict(redis, [append.key], append)

    assert (first, second, await redis.get(append.key), append.calls) == (None, "ba", "ba", 2)
