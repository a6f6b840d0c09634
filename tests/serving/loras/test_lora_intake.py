"""Files of LoRAs on their way in: slow addresses hold up their own owner alone, and size costs no memory."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from contextlib import AsyncExitStack

import pytest
from redis.asyncio import Redis

from deployments.protocol.errors import BadRequest, TooLarge
from serve_app.loras.intake import LoraIntake
from serve_app.loras.registry import LoraRegistry
from serve_app.loras.spec import LoraSpec
from serve_app.settings import Settings
from serve_app.storage import url_fetcher
from serve_app.storage.results import ResultStore, adapter_path
from serve_app.storage.spooled_file import SpooledFile
from serve_app.storage.url_fetcher import Unreachable, UrlFetcher
from tests.patience import patience
from tests.serving.api.lora_files import lora_file
from tests.serving.remote_server import Page, RemoteServer, page

MIB = 2**20


@pytest.fixture
def intake(remote: RemoteServer, redis: Redis, results: ResultStore, settings: Settings) -> LoraIntake:
    fetcher = UrlFetcher(["*"], resolve=remote.resolve, network=remote, tls=remote.trusted)
    registry = LoraRegistry(redis, settings.redis_prefix, 100)
    return LoraIntake(registry, results, settings, fetcher=fetcher, hub=UrlFetcher(()))


def url(name: str) -> LoraSpec:
    return LoraSpec("url", 1.0, f"https://files.example.org/{name}")


async def taken_in(intake: LoraIntake, spec: LoraSpec, owner: str) -> str:
    async with AsyncExitStack() as holds:
        return (await intake.take_in(spec, owner, holds))[0]


def endless(started: asyncio.Semaphore) -> Page:
    """A page that begins and then sends nothing more."""

    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\nx")
        await writer.drain()
        started.release()
        await asyncio.sleep(patience(10))

    return send


def large_lora(size_bytes: int) -> bytes:
    """An accepted file of about this size: two factors of rank 8."""
    columns = size_bytes // 32
    shapes = {"down": [8, columns], "up": [columns, 8]}
    table, at = {}, 0
    for side, shape in shapes.items():
        table[f"lora_unet_down_blocks_0_attentions_0_proj_in.lora_{side}.weight"] = {
            "dtype": "F16", "shape": shape, "data_offsets": [at, at := at + 16 * columns],
        }  # fmt: skip
    header = json.dumps(table).encode()
    return len(header).to_bytes(8, "little") + header + b"\x00\x14" * (at // 2)


async def test_slow_addresses_of_one_owner_stop_no_other_owners_file(
    remote: RemoteServer, intake: LoraIntake, results: ResultStore
) -> None:
    started = asyncio.Semaphore(0)
    for number in range(6):
        remote.pages[f"/slow{number}"] = endless(started)
    remote.pages["/good"] = page(lora_file(5))
    slow = [asyncio.create_task(taken_in(intake, url(f"slow{n}"), "ann")) for n in range(6)]
    await started.acquire()
    await started.acquire()

    async with asyncio.timeout(patience()):
        digest = await taken_in(intake, url("good"), "bob")
        from_ann = await taken_in(intake, LoraSpec("file", 1.0, file=lora_file(6)), "ann")

    assert await results.has(adapter_path(digest))
    assert await results.has(adapter_path(from_ann))
    assert started.locked(), "an owner has two downloads at once"
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)


async def test_an_address_that_stalls_or_drips_is_given_up(
    remote: RemoteServer, intake: LoraIntake, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)

    remote.pages["/stall"], remote.pages["/drip"] = endless(asyncio.Semaphore(0)), drip
    monkeypatch.setattr(url_fetcher, "SLOW_AFTER_S", 0.05)
    with pytest.raises(Unreachable, match=r"KiB/s.*use a faster host, or upload it"):
        await taken_in(intake, url("drip"), "ann")

    monkeypatch.setattr(url_fetcher, "STALL_S", 0.1)
    with pytest.raises(Unreachable, match="ReadTimeout"):
        await taken_in(intake, url("stall"), "ann")


@pytest.mark.parametrize("by", ["upload", "url"])
async def test_a_large_file_is_taken_in_without_being_held_in_memory(
    remote: RemoteServer, intake: LoraIntake, results: ResultStore, by: str
) -> None:
    data = large_lora(64 * MIB)

    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode())
        for start in range(0, len(data), MIB):
            writer.write(memoryview(data)[start : start + MIB])
            await writer.drain()
        writer.close()

    remote.pages["/large"] = send
    with SpooledFile.of(data) as uploaded:
        spec = url("large") if by == "url" else LoraSpec("file", 1.0, file=uploaded)
        tracemalloc.start()
        digest = await taken_in(intake, spec, "ann")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    assert peak < 40 * MIB
    stored = await results.get(adapter_path(digest), sha256=digest)
    assert stored == data


async def test_a_file_over_the_limit_and_one_that_is_no_lora_name_their_field(intake: LoraIntake) -> None:
    with pytest.raises(BadRequest, match="refused") as refused:
        await taken_in(intake, LoraSpec("file", 1.0, file=b"", param="file"), "ann")
    intake._settings = intake._settings.model_copy(update={"max_adapter_bytes": 2000})
    with pytest.raises(TooLarge, match="at most 2000") as large:
        await taken_in(intake, LoraSpec("file", 1.0, file=bytes(3000), param="base64"), "ann")

    assert (refused.value.param, large.value.param) == ("file", "base64")
