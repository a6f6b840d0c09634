"""Disk, memory and device hold bounded numbers of LoRAs, and never evict one that is in use."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deployments.loras.batched_lora import BatchedLora
from deployments.loras.cache import COPIES, LoraCache, LoraCacheLimits
from deployments.loras.device_slots import SlotMemory
from deployments.loras.file_cache import LoraFileCache
from deployments.models.device_memory import DeviceMemory
from deployments.models.memory_admission import MemoryAdmission
from deployments.models.model_memory import LoraMemory
from deployments.protocol.errors import BadRequest, NotFound, OutOfMemory, Overloaded
from deployments.protocol.request import Lora
from tests.inference import tiny
from tests.inference.lora_files import file_of, random_lora
from tests.patience import patience

PATIENCE_S = patience(2)


class StoredFiles:
    """All registered files, counting their reads; a gate may hold them back."""

    def __init__(self, files: list[bytes]) -> None:
        self.files = {hashlib.sha256(file).hexdigest(): file for file in files}
        self.read_counts: Counter[str] = Counter()
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()

    async def read(self, digest: str) -> bytes:
        self.read_counts[digest] += 1
        self.asked.set()
        await self.gate.wait()
        if digest not in self.files:
            raise NotFound("no such LoRA")
        return self.files[digest]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny.flux()


@pytest.fixture(scope="module")
def files(pipeline: Any) -> list[bytes]:
    def attention(path: str, _layer: nn.Module) -> bool:
        return path.endswith("attn.to_q")

    return [file_of(random_lora(pipeline, ["transformer"], seed=seed, only=attention)) for seed in range(12)]


@pytest.fixture
def stored(files: list[bytes]) -> StoredFiles:
    return StoredFiles(files)


@pytest.fixture
def make_cache(pipeline: Any, stored: StoredFiles) -> Iterator[Callable[..., LoraCache]]:
    made: list[tuple[LoraCache, BatchedLora]] = []

    def make(*, memory: SlotMemory | None = None, **limits: Any) -> LoraCache:
        batched_lora = BatchedLora({"transformer": pipeline.transformer}, deterministic=False)
        lora_cache = LoraCache(
            pipeline, batched_lora, torch.device("cpu"), stored, LoraCacheLimits(**limits), memory
        )
        made.append((lora_cache, batched_lora))
        return lora_cache

    yield make
    for lora_cache, batched_lora in reversed(made):  # each restores what it found
        lora_cache.close()
        batched_lora.unhook()


async def on_engine(function: Callable[[], Any]) -> Any:
    return function()


def loras(files: list[bytes], *numbers: int) -> list[Lora]:
    return [Lora(id=hashlib.sha256(files[number]).hexdigest()) for number in numbers]


def contents(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def use(lora_cache: LoraCache, wanted: list[Lora]) -> Any:
    async with lora_cache.using(wanted, on_engine) as lora_set:
        return lora_set


async def test_device_and_memory_hold_no_more_than_their_limits(
    make_cache: Callable[..., LoraCache], files: list[bytes], stored: StoredFiles
) -> None:
    lora_cache = make_cache(on_device=2, in_memory=4)

    for number in range(12):
        await use(lora_cache, loras(files, number))
        assert lora_cache.usage.on_device <= 2
        assert lora_cache.usage.in_memory <= 4

    one = lora_cache.usage.memory_bytes // 4
    assert lora_cache.usage.device_bytes == 2 * one
    assert set(stored.read_counts.values()) == {1}


async def test_of_a_thousand_adapters_memory_holds_64_and_the_device_8(
    make_cache: Callable[..., LoraCache], pipeline: Any, stored: StoredFiles
) -> None:
    def one_layer(path: str, _layer: nn.Module) -> bool:
        return path == "transformer_blocks.0.attn.to_q"

    tensors = random_lora(pipeline, ["transformer"], only=one_layer)
    thousand = [file_of(tensors, {"number": str(number)}) for number in range(1000)]
    stored.files |= {hashlib.sha256(file).hexdigest(): file for file in thousand}
    lora_cache = make_cache(on_device=8, in_memory=64)
    weights = [1 / rank for rank in range(1, 1001)]
    most = 0

    for number in random.Random(0).choices(range(1000), weights, k=400):  # Zipf's law
        async with lora_cache.using(loras(thousand, number), on_engine):
            usage = lora_cache.usage
            assert usage.on_device <= 8
            assert usage.in_memory <= 64
            most = max(most, usage.device_bytes + usage.memory_bytes)

    one = lora_cache.usage.memory_bytes // 64
    assert most <= (8 + 64) * one
    assert (lora_cache.usage.on_device, lora_cache.usage.in_memory) == (8, 64)
    assert len(stored.read_counts) > 128
    assert stored.read_counts[loras(thousand, 0)[0].id] == 1  # the most popular one stayed


async def test_memory_is_bounded_by_bytes_too(
    make_cache: Callable[..., LoraCache], files: list[bytes]
) -> None:
    lora_cache = make_cache(on_device=1)
    await use(lora_cache, loras(files, 0))
    one = lora_cache.usage.memory_bytes

    small = make_cache(on_device=1, memory_bytes=3 * one)
    for number in range(12):
        await use(small, loras(files, number))

    assert small.usage.memory_bytes == 3 * one


async def test_the_least_recently_used_leaves_first_and_one_in_use_never(
    make_cache: Callable[..., LoraCache], files: list[bytes], stored: StoredFiles
) -> None:
    lora_cache = make_cache(on_device=3, in_memory=1)
    async with lora_cache.using(loras(files, 0), on_engine) as lora_set:
        for number in (1, 2, 1, 3):  # 3 evicts 2
            await use(lora_cache, loras(files, number))
        again = await use(lora_cache, loras(files, 0))
        await use(lora_cache, loras(files, 1))

        assert again is lora_set
        assert lora_cache.usage.on_device == 3

    assert [stored.read_counts[lora.id] for lora in loras(files, 0, 1, 2, 3)] == [1, 1, 1, 1]
    await use(lora_cache, loras(files, 2))
    assert stored.read_counts[loras(files, 2)[0].id] == 2


async def test_a_request_without_a_slot_waits_for_a_running_one_to_end(
    make_cache: Callable[..., LoraCache], files: list[bytes]
) -> None:
    lora_cache = make_cache(on_device=2, max_overtaken_s=PATIENCE_S)
    async with AsyncExitStack() as running:
        await running.enter_async_context(lora_cache.using(loras(files, 0, 1), on_engine))
        waiting = asyncio.ensure_future(use(lora_cache, loras(files, 2)))
        await use(lora_cache, loras(files, 1))  # its adapter is on the device

        assert not waiting.done()

    assert await asyncio.wait_for(waiting, PATIENCE_S)


async def test_a_wait_for_a_slot_ends_with_advice(
    make_cache: Callable[..., LoraCache], files: list[bytes]
) -> None:
    lora_cache = make_cache(on_device=1, wait_s=0.05)
    async with lora_cache.using(loras(files, 0), on_engine):
        with pytest.raises(Overloaded, match="adapters_on_device"):
            await use(lora_cache, loras(files, 1))

    assert await use(lora_cache, loras(files, 1))


async def test_two_requests_of_several_adapters_do_not_wait_for_each_other(
    make_cache: Callable[..., LoraCache], files: list[bytes]
) -> None:
    lora_cache = make_cache(on_device=3)
    requests = [loras(files, *numbers) for numbers in ((0, 1), (2, 3), (1, 2), (3, 0), (4, 5, 6)) * 3]

    lora_sets = await asyncio.wait_for(
        asyncio.gather(*(use(lora_cache, request) for request in requests)), PATIENCE_S
    )

    assert all(lora_sets)


async def test_more_adapters_than_slots_are_refused(
    make_cache: Callable[..., LoraCache], files: list[bytes]
) -> None:
    with pytest.raises(BadRequest, match="at most 1"):
        await use(make_cache(on_device=1), loras(files, 0, 1))


async def test_requests_for_one_cold_adapter_share_one_reading(
    make_cache: Callable[..., LoraCache], files: list[bytes], stored: StoredFiles
) -> None:
    lora_cache = make_cache()
    stored.gate.clear()
    users = [asyncio.ensure_future(use(lora_cache, loras(files, 0))) for _ in range(5)]
    await asyncio.wait_for(stored.asked.wait(), PATIENCE_S)
    users[0].cancel()  # the request that started the reading
    stored.gate.set()

    lora_sets = await asyncio.wait_for(asyncio.gather(*users[1:]), PATIENCE_S)

    assert all(lora_sets)
    assert set(stored.read_counts.values()) == {1}


async def test_a_slow_file_delays_no_other_request(
    make_cache: Callable[..., LoraCache], files: list[bytes], stored: StoredFiles
) -> None:
    lora_cache = make_cache()
    await use(lora_cache, loras(files, 1))
    stored.gate.clear()
    stored.asked.clear()
    slow = asyncio.ensure_future(use(lora_cache, loras(files, 0)))
    await asyncio.wait_for(stored.asked.wait(), PATIENCE_S)

    assert await asyncio.wait_for(use(lora_cache, loras(files, 1)), PATIENCE_S)

    stored.gate.set()
    assert await asyncio.wait_for(slow, PATIENCE_S)


async def test_a_file_that_fails_leaves_no_trace_and_may_be_tried_again(
    make_cache: Callable[..., LoraCache], files: list[bytes], stored: StoredFiles
) -> None:
    lora_cache = make_cache()
    (lora,) = loras(files, 0)
    file = stored.files.pop(lora.id)
    with pytest.raises(NotFound):
        await use(lora_cache, [lora])
    assert lora_cache.usage.on_device == 0

    stored.files[lora.id] = file

    assert await use(lora_cache, [lora])


async def test_an_unloaded_adapter_stays_until_its_last_user_ends(
    make_cache: Callable[..., LoraCache], files: list[bytes]
) -> None:
    lora_cache = make_cache()
    (lora,) = loras(files, 0)
    async with lora_cache.using([lora], on_engine):
        lora_cache.unload(lora.id)
        assert lora_cache.usage.on_device == 1

    assert (lora_cache.usage.on_device, lora_cache.usage.in_memory) == (0, 0)


async def test_layers_are_hooked_once_and_unhooked_afterwards(
    make_cache: Callable[..., LoraCache], pipeline: Any, files: list[bytes]
) -> None:
    lora_cache = make_cache(on_device=1)
    layer = pipeline.transformer.transformer_blocks[0].attn.to_q
    untouched = pipeline.transformer.transformer_blocks[0].attn.to_k
    for number in range(5):
        await use(lora_cache, loras(files, number))

    assert ("forward" in vars(layer), "forward" in vars(untouched)) == (True, False)

    lora_cache._batched_lora.unhook()
    assert "forward" not in vars(layer)


# --- files on disk ----------------------------------------------------------------------------------------


async def test_fetched_files_are_kept_within_max_bytes(
    tmp_path: Path, files: list[bytes], stored: StoredFiles
) -> None:
    cache = LoraFileCache(tmp_path / "adapters", 3 * len(files[0]) + 10, stored)

    for lora in loras(files, 0, 1, 2, 3):
        assert await cache.read(lora.id) == stored.files[lora.id]

    assert sum(path.stat().st_size for path in contents(tmp_path / "adapters")) <= 3 * len(files[0]) + 10
    assert len(contents(tmp_path / "adapters")) == 3
    another = LoraFileCache(tmp_path / "adapters", 10**9)
    assert await another.read(loras(files, 3)[0].id) == files[3]


async def test_a_damaged_file_on_disk_is_fetched_again(
    tmp_path: Path, files: list[bytes], stored: StoredFiles
) -> None:
    cache = LoraFileCache(tmp_path, 10**9, stored)
    (lora,) = loras(files, 0)
    await cache.read(lora.id)
    (kept,) = contents(tmp_path)
    kept.write_bytes(files[0][:-1] + b"!")

    assert await cache.read(lora.id) == files[0]
    assert stored.read_counts[lora.id] == 2
    assert await cache.read(lora.id) == files[0]
    assert stored.read_counts[lora.id] == 2


async def test_a_remote_that_gives_another_file_is_refused(tmp_path: Path, files: list[bytes]) -> None:
    wrong = StoredFiles(files)
    (lora,) = loras(files, 0)
    wrong.files[lora.id] = files[1]

    with pytest.raises(BadRequest, match="SHA-256"):
        await LoraFileCache(tmp_path, 10**9, wrong).read(lora.id)

    assert contents(tmp_path) == []


def test_a_request_names_a_file_by_its_own_digest(files: list[bytes]) -> None:
    with pytest.raises(ValueError, match="SHA-256"):
        Lora(id="0" * 64, file=files[0])


# --- the device's memory -----------------------------------------------------------------------------------


@dataclass
class Device:
    """A device whose memory holds so many LoRAs and nothing else."""

    one: int  # bytes that a LoRA claims
    loras: float
    admission: MemoryAdmission = field(init=False)

    def __post_init__(self) -> None:
        self.admission = MemoryAdmission(DeviceMemory(lambda: int(self.loras * self.one)), patience())

    @property
    def memory(self) -> SlotMemory:
        return LoraMemory(self.admission, "flux")

    @property
    def held(self) -> float:
        return self.admission.memory.held["loras"] / self.one


@pytest.fixture
async def one(make_cache: Callable[..., LoraCache], files: list[bytes]) -> int:
    """Bytes that one of the LoRAs claims on the device."""
    lora_cache = make_cache()
    await use(lora_cache, loras(files, 0))
    return COPIES * lora_cache.usage.device_bytes


async def test_idle_loras_are_evicted_when_bytes_are_short(
    make_cache: Callable[..., LoraCache], files: list[bytes], one: int
) -> None:
    device = Device(one, loras=2.5)
    lora_cache = make_cache(on_device=8, memory=device.memory)
    device.admission.add_evictor(lambda _model: lora_cache.make_way(), "loras")

    for number in (0, 1, 0, 2):
        await use(lora_cache, loras(files, number))

    assert (lora_cache.usage.on_device, lora_cache.stats.evicted, device.held) == (2, 1, 2)
    await use(lora_cache, loras(files, 0))  # the one used last stayed
    assert lora_cache.stats.on_device == 2
    lora_cache.close()
    assert device.held == 0


async def test_a_lora_that_can_never_fit_is_refused_with_its_bytes(
    make_cache: Callable[..., LoraCache], files: list[bytes], one: int
) -> None:
    device = Device(one, loras=0.5)
    lora_cache = make_cache(memory=device.memory)

    with pytest.raises(OutOfMemory, match=r"the LoRA \w{12} needs 0.00 GiB of the device's memory; at most"):
        await use(lora_cache, loras(files, 0))

    assert (lora_cache.usage.on_device, device.held) == (0, 0)


async def test_a_lora_waits_for_one_in_use(
    make_cache: Callable[..., LoraCache], files: list[bytes], one: int
) -> None:
    device = Device(one, loras=1.5)
    lora_cache = make_cache(memory=device.memory)
    device.admission.add_evictor(lambda _model: lora_cache.make_way(), "loras")

    async with lora_cache.using(loras(files, 0), on_engine):
        second = asyncio.create_task(use(lora_cache, loras(files, 1)))
        await asyncio.wait([second], timeout=0.05)
        assert not second.done()

    assert await asyncio.wait_for(second, patience()) is not None
    assert device.held == 1


async def test_requests_that_wait_for_each_others_loras_do_not_wait_in_vain(
    make_cache: Callable[..., LoraCache], files: list[bytes], one: int
) -> None:
    device = Device(one, loras=2.5)
    lora_cache = make_cache(memory=device.memory)
    device.admission.add_evictor(lambda _model: lora_cache.make_way(), "loras")
    requests = [loras(files, 0, 1), loras(files, 2, 3)]

    ended = await asyncio.wait_for(
        asyncio.gather(*(use(lora_cache, wanted) for wanted in requests), return_exceptions=True), patience()
    )

    refused = [one for one in ended if isinstance(one, Exception)]
    assert len(refused) <= 1
    assert all(isinstance(one, Overloaded) for one in refused)
    assert device.held <= 2


async def test_a_dora_is_measured_between_forwards_and_serves_with_its_weight(
    make_cache: Callable[..., LoraCache], pipeline: Any, stored: StoredFiles
) -> None:
    path = "transformer_blocks.0.attn.to_q"
    plain = random_lora(pipeline, ["transformer"], only=lambda own, _: own == path)
    key = f"transformer.{path}.lora_magnitude_vector"
    file = file_of({**plain, key: torch.full((pipeline.transformer.get_submodule(path).out_features,), 2.0)})
    digest = hashlib.sha256(file).hexdigest()
    stored.files[digest] = file
    measured: list[int] = []

    async def count(function: Callable[[], Any]) -> Any:
        measured.append(1)
        return function()

    lora_cache = make_cache()
    async with lora_cache.using([Lora(id=digest, weight=0.5)], count) as lora_set:
        assert lora_set is not None
        (change,) = lora_set.row_changes.values()
        (part,) = lora_set.layers["transformer", path].parts

    weight = pipeline.transformer.get_submodule(path).weight.detach()
    length = (weight + part.scale * part.b @ part.a).norm(dim=1)
    torch.testing.assert_close(change.gain, 2.0 / length)
    assert len(measured) >= 3, "forwards replaced, rows measured, the set computed"
    assert lora_cache.usage.device_bytes > sum(tensor.nbytes for tensor in plain.values())
