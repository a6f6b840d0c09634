"""Several models in one replica: least recently used out, one in use stays, memory is counted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from deployments.models.device_memory import DeviceMemory
from deployments.models.memory_admission import MemoryAdmission
from deployments.models.model_cache import PIPELINE, ModelCache
from deployments.protocol.errors import OutOfMemory
from tests.patience import patience

SIZES = {"small": 1, "middle": 4, "large": 8}


class Library:
    def __init__(self) -> None:
        self.log: list[str] = []
        self.memory = DeviceMemory(lambda: None)
        self.may_load = threading.Event()
        self.may_load.set()
        self.loading = threading.Event()

    def load(self, name: str) -> str:
        self.loading.set()
        assert self.may_load.wait(patience())
        if name == "broken":
            self.memory.release_weights(name)
            raise OSError("no such file")
        self.log.append(f"+{name}")
        return name

    def unload(self, model: str) -> None:
        self.log.append(f"-{model}")
        self.memory.release_weights(model)

    def model_cache(
        self, *, limit: int = 2, max_bytes: int | None = None, size_of: Callable[[str], int] = lambda _: 1
    ) -> ModelCache[str]:
        self.memory = DeviceMemory(lambda: max_bytes)
        return ModelCache(
            self.load,
            self.unload,
            size_of,
            limit=limit,
            admission=MemoryAdmission(self.memory),
            expected_bytes=size_of,
        )


async def use(model_cache: ModelCache[str], name: str) -> str:
    async with model_cache.using(name) as model:
        return model


async def test_the_least_recently_used_model_is_unloaded() -> None:
    library = Library()
    model_cache = library.model_cache(limit=2)

    for name in ("a", "b", "a", "c", "a"):
        assert await use(model_cache, name) == name

    assert library.log == ["+a", "+b", "-b", "+c"]
    assert list(model_cache.loaded) == ["c", "a"]


async def test_a_model_in_use_stays_and_the_next_one_waits_for_it() -> None:
    library = Library()
    model_cache = library.model_cache(limit=1)

    async with model_cache.using("a"):
        waiting = asyncio.create_task(use(model_cache, "b"))
        await asyncio.sleep(0.05)
        assert library.log == ["+a"]
        assert not waiting.done()

    assert await asyncio.wait_for(waiting, patience()) == "b"
    assert library.log == ["+a", "-a", "+b"]


async def test_memory_is_limited_as_well_as_the_number() -> None:
    library = Library()
    model_cache = library.model_cache(limit=3, max_bytes=9, size_of=SIZES.__getitem__)

    for name in ("small", "middle", "large"):
        await use(model_cache, name)

    assert library.log == ["+small", "+middle", "-small", "-middle", "+large"]
    assert model_cache.loaded == {"large": 8}


async def test_concurrent_requests_load_a_model_once() -> None:
    library = Library()
    model_cache = library.model_cache()

    assert await asyncio.gather(*[use(model_cache, "a") for _ in range(5)]) == ["a"] * 5
    assert library.log == ["+a"]


async def test_a_model_that_cannot_be_loaded_is_not_counted() -> None:
    library = Library()
    model_cache = library.model_cache(limit=1)

    with pytest.raises(OSError, match="no such file"):
        await use(model_cache, "broken")

    assert await use(model_cache, "a") == "a"


async def test_a_model_that_can_never_fit_is_refused_and_the_loaded_one_stays() -> None:
    library = Library()
    model_cache = library.model_cache(limit=3, max_bytes=7, size_of=SIZES.__getitem__)
    await use(model_cache, "small")

    with pytest.raises(OutOfMemory, match="the model large needs"):
        await use(model_cache, "large")

    assert library.log == ["+small"]
    assert await use(model_cache, "middle") == "middle"


async def test_a_model_waits_for_the_memory_of_one_in_use() -> None:
    library = Library()
    model_cache = library.model_cache(limit=3, max_bytes=9, size_of=SIZES.__getitem__)

    async with model_cache.using("middle"):
        waiting = asyncio.create_task(use(model_cache, "large"))
        assert await use(model_cache, "middle") == "middle"
        assert not waiting.done()

    assert await asyncio.wait_for(waiting, patience()) == "large"


async def test_a_model_whose_request_is_cancelled_is_loaded_all_the_same() -> None:
    library = Library()
    library.may_load.clear()
    model_cache = library.model_cache(limit=2, max_bytes=9, size_of=SIZES.__getitem__)
    request = asyncio.create_task(use(model_cache, "middle"))
    await asyncio.to_thread(library.loading.wait, patience())

    request.cancel()
    await asyncio.wait([request])
    library.may_load.set()

    assert await use(model_cache, "middle") == "middle"
    assert library.log == ["+middle"]
    assert library.memory.held["weights"] == 4


class SlowToUnload(Library):
    """Its models leave when `may_unload` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.unloading, self.may_unload = threading.Event(), threading.Event()

    def load(self, name: str) -> str:
        model = super().load(name)
        self.memory.record("weights", (name, PIPELINE), SIZES[name])
        return model

    def unload(self, model: str) -> None:
        self.unloading.set()
        assert self.may_unload.wait(patience())
        super().unload(model)


async def test_a_model_that_is_leaving_is_loaded_again_after_it_has_left() -> None:
    library = SlowToUnload()
    model_cache = library.model_cache(limit=2)
    for name in ("small", "middle"):
        await use(model_cache, name)
    larger = asyncio.create_task(use(model_cache, "large"))
    await asyncio.to_thread(library.unloading.wait, patience())
    again = asyncio.create_task(use(model_cache, "small"))
    await asyncio.sleep(0.05)
    library.may_unload.set()

    await asyncio.wait_for(asyncio.gather(larger, again), patience())

    assert library.log.index("-small") < len(library.log) - 1 - library.log[::-1].index("+small")
    assert library.memory.weights_of("small") == SIZES["small"]


async def test_what_needs_memory_waits_for_a_model_that_is_leaving() -> None:
    library = SlowToUnload()
    model_cache = library.model_cache(limit=4, max_bytes=10, size_of=lambda name: SIZES.get(name, 0))
    admission = model_cache._admission
    admission.enter_loop()
    await use(model_cache, "large")
    first = asyncio.create_task(admission.admit("weights", ("a", "net"), 6, "a net"))
    await asyncio.to_thread(library.unloading.wait, patience())
    second = asyncio.create_task(admission.admit("weights", ("b", "net"), 3, "another"))
    await asyncio.sleep(0.05)
    assert not second.done()
    library.may_unload.set()

    await asyncio.wait_for(asyncio.gather(first, second), patience())


async def test_an_unloading_ends_though_the_request_that_caused_it_is_cancelled() -> None:
    library = SlowToUnload()
    model_cache = library.model_cache(limit=4, max_bytes=10, size_of=lambda name: SIZES.get(name, 0))
    model_cache._admission.enter_loop()
    await use(model_cache, "large")
    asking = asyncio.create_task(model_cache._admission.admit("weights", ("a", "net"), 6, "a net"))
    await asyncio.to_thread(library.unloading.wait, patience())
    asking.cancel()
    library.may_unload.set()
    await asyncio.gather(asking, return_exceptions=True)

    await asyncio.wait_for(use(model_cache, "large"), patience())

    assert library.log == ["+large", "-large", "+large"]
