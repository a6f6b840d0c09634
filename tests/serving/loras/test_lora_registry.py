"""The LoRA registry on a real Valkey: owners, names, limits, and files that are held or removed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from deployments.lora_format.file_info import inspect_lora
from deployments.protocol.errors import Conflict, NotFound, Overloaded, QuotaExceeded
from serve_app.loras.record import PUBLIC, LoraLabel, LoraRecord, make_record
from serve_app.loras.registry import LoraRegistry
from serve_app.settings import Settings
from tests.serving.api.lora_files import digest, lora_file


@pytest.fixture
def registry(redis: Redis, settings: Settings) -> LoraRegistry:
    return LoraRegistry(redis, settings.redis_prefix, max_per_owner=3)


def record(seed: int, name: str = "ink", owner: str = "ada", *, public: bool = False) -> LoraRecord:
    file = lora_file(seed)
    return make_record(digest(file), inspect_lora(file), LoraLabel(name, public=public), owner, "upload")


async def test_adapters_are_their_owners_unless_public(registry: LoraRegistry) -> None:
    mine = await registry.add(record(1))
    shared = await registry.add(record(2, "fog", public=True))

    assert await registry.find("ink", "ada") == mine
    assert await registry.find("ink", "bob") is None
    assert await registry.find(mine.id, "bob") is None
    assert await registry.find("FOG", "bob") == shared
    assert await registry.list("ada") == [mine, shared]
    assert await registry.list("bob") == [shared]
    assert shared.owner == PUBLIC


async def test_an_own_name_comes_before_the_public_one(registry: LoraRegistry) -> None:
    await registry.add(record(1, public=True))
    mine = await registry.add(record(2))

    found = await registry.find("ink", "ada")

    assert found == mine


async def test_owners_may_have_the_same_file_and_the_same_name(registry: LoraRegistry) -> None:
    hers = await registry.add(record(1))
    his = await registry.add(record(1, owner="bob"))

    await registry.remove(hers)

    assert await registry.find("ink", "bob") == his
    assert await registry.digests() == {his.digest}


async def test_a_name_is_free_again_after_a_removal_or_another_name(registry: LoraRegistry) -> None:
    first = await registry.add(record(1))
    with pytest.raises(Conflict, match="another adapter called"):
        await registry.add(record(2, "Ink"))

    await registry.add(replace(first, name="pen"))
    await registry.add(record(2, "Ink"))

    assert [adapter.name for adapter in await registry.list("ada")] == ["Ink", "pen"]


async def test_an_owner_has_a_limit_that_changes_do_not_count_against(registry: LoraRegistry) -> None:
    for seed in (1, 2, 3):
        await registry.add(record(seed, f"n{seed}"))

    with pytest.raises(QuotaExceeded, match="3 adapters"):
        await registry.add(record(4, "n4"))

    await registry.add(record(3, "renamed"))
    await registry.add(record(4, "n4", owner="bob"))


async def test_many_at_once_under_one_name_leave_one(registry: LoraRegistry) -> None:
    outcomes = await asyncio.gather(
        *(registry.add(record(seed)) for seed in range(1, 4)), return_exceptions=True
    )

    assert sum(isinstance(outcome, LoraRecord) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 2


async def test_removing_twice_is_an_error(registry: LoraRegistry) -> None:
    adapter = await registry.add(record(1), preview=b"RIFF")
    await registry.remove(adapter)

    with pytest.raises(NotFound):
        await registry.remove(adapter)

    with pytest.raises(NotFound):
        await registry.preview(adapter)


async def test_a_preview_stays_when_only_words_change(registry: LoraRegistry) -> None:
    await registry.add(record(1), preview=b"\x00RIFF\xff")

    again = await registry.add(record(1, "pen"))

    assert again.preview
    assert await registry.preview(again) == b"\x00RIFF\xff"


async def test_a_held_file_is_not_removed_and_one_being_removed_is_not_held(registry: LoraRegistry) -> None:
    async with registry.hold("d1"), registry.hold("d1"), registry.begin_removal("d1") as removed:
        assert not removed

    async with registry.begin_removal("d1") as removed, registry.begin_removal("d1") as twice:
        assert (removed, twice) == (True, False)
        with pytest.raises(Overloaded, match="being deleted"):
            async with registry.hold("d1"):
                pass

    async with registry.hold("d1"):
        pass


async def test_holds_leave_no_key_that_stays_for_ever(
    registry: LoraRegistry, redis: Redis, settings: Settings
) -> None:
    async with registry.hold("d1"), registry.begin_removal("d2"):
        keys = [key async for key in redis.scan_iter(f"{settings.redis_prefix}*")]
        lives = [await redis.ttl(key) for key in keys]

    assert len(keys) == 2
    assert min(lives) > 0
