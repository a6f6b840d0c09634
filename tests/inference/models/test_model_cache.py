"""Several models in one replica: least recently used out, one in use stays, memory is counted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from deployments.models.device_memory import PIPELINE, DeviceMemory, Needed
from deployments.models.memory_admission import MemoryAdmission
from deployments.models.model_cache import ModelCache
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
            raise OSError("no such file")
        self.log.append(f"+{name}")
        return name

    def unload(self, model: str) -> None:
        self.log.append(f"-{model}")

    def model_cache(
        self,
        *,
        limit: int = 2,
        max_bytes: int | None = None,
        size_of: Callable[[str], int] = lambda _: 1,
        picture: int | None = None,
        **options: Any,
    ) -> ModelCache[str]:
        self.memory = DeviceMemory(lambda: max_bytes)
        return ModelCache(
            self.load,
            self.unload,
            size_of,
            limit=limit,
            admission=MemoryAdmission(self.memory),
            needed=lambda name: Needed(size_of(name), picture=picture),
            **options,
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
    first = asyncio.create_task(admission.admit("weights", ("a", "net"), Needed(6), "a net"))
    await asyncio.to_thread(library.unloading.wait, patience())
    second = asyncio.create_task(admission.admit("weights", ("b", "net"), Needed(3), "another"))
    await asyncio.sleep(0.05)
    assert not second.done()
    library.may_unload.set()

    await asyncio.wait_for(asyncio.gather(first, second), patience())


async def test_an_unloading_ends_though_the_request_that_caused_it_is_cancelled() -> None:
    library = SlowToUnload()
    model_cache = library.model_cache(limit=4, max_bytes=10, size_of=lambda name: SIZES.get(name, 0))
    model_cache._admission.enter_loop()
    await use(model_cache, "large")
    asking = asyncio.create_task(model_cache._admission.admit("weights", ("a", "net"), Needed(6), "a net"))
    await asyncio.to_thread(library.unloading.wait, patience())
    asking.cancel()
    library.may_unload.set()
    await asyncio.gather(asking, return_exceptions=True)

    await asyncio.wait_for(use(model_cache, "large"), patience())

    assert library.log == ["+large", "-large", "+large"]


async def overlapping(model_cache: ModelCache[str], name: str, most: int) -> int:
    """How many requests for a loaded model began to use it, each while the one before still did, until one
    had to wait; at most `most`."""
    begun = 0
    ends = [asyncio.Event() for _ in range(most)]

    async def request(end: asyncio.Event) -> None:
        nonlocal begun
        async with model_cache.using(name):
            begun += 1
            await end.wait()

    running: list[asyncio.Task[None]] = []
    for end in ends:
        before = begun
        running.append(asyncio.create_task(request(end)))
        await asyncio.sleep(0)
        if begun == before:
            break
        if len(running) > 1:
            ends[len(running) - 2].set()
    for end in ends:
        end.set()
    await asyncio.wait_for(asyncio.gather(*running), patience())
    return begun


async def has_begun_to_wait(model_cache: ModelCache[str]) -> None:
    for _ in range(100):
        await asyncio.to_thread(lambda: None)  # as `prepare` runs in a thread
        if model_cache._waiting is not None:
            return
    pytest.fail("no model waits for space")


async def test_requests_for_a_loaded_model_pass_one_that_waits_for_a_bounded_time_only() -> None:
    """By a clock of our own: it stands, then it is past the bound."""
    library, now = Library(), [0.0]
    model_cache = library.model_cache(limit=1, max_overtaken_s=30.0, clock=lambda: now[0])
    async with model_cache.using("a"):
        waiting = asyncio.create_task(use(model_cache, "b"))
        await has_begun_to_wait(model_cache)
        now[0] = 29.0
        passed = await overlapping(model_cache, "a", 20)
        now[0] = 30.0
        late = asyncio.create_task(use(model_cache, "a"))
        await asyncio.sleep(0)
        assert not late.done()

    assert await asyncio.wait_for(asyncio.gather(waiting, late), patience()) == ["b", "a"]
    assert passed == 20
    assert library.log == ["+a", "-a", "+b", "-b", "+a"]


async def test_requests_without_a_gap_do_not_keep_a_model_from_its_space() -> None:
    library, now = Library(), [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    model_cache = library.model_cache(limit=1, max_overtaken_s=30.0, clock=clock)
    first = asyncio.Event()

    async def long_request() -> None:
        async with model_cache.using("a"):
            await first.wait()

    running = asyncio.create_task(long_request())
    await asyncio.to_thread(library.loading.wait, patience())
    waiting = asyncio.create_task(use(model_cache, "b"))
    await has_begun_to_wait(model_cache)
    asyncio.get_running_loop().call_soon(first.set)
    begun = await overlapping(model_cache, "a", 1000)

    assert await asyncio.wait_for(waiting, patience()) == "b"
    await running
    assert begun < 100, "the last of them waited for b, and nothing was lost"


async def test_a_model_that_no_request_waits_for_any_more_holds_up_no_other() -> None:
    library = Library()
    model_cache = library.model_cache(limit=1, max_overtaken_s=0.0)
    async with model_cache.using("a"):
        given_up = asyncio.create_task(use(model_cache, "b"))
        await has_begun_to_wait(model_cache)
        late = asyncio.create_task(use(model_cache, "a"))
        await asyncio.sleep(0)
        assert not late.done()

        given_up.cancel()

        assert await asyncio.wait_for(late, patience()) == "a"


async def test_a_model_is_not_evicted_before_the_request_that_had_it_loaded_uses_it() -> None:
    library = Library()
    model_cache = library.model_cache(limit=1, max_overtaken_s=0.0)
    names = ["a", "b", "a", "b", "c"]

    assert await asyncio.wait_for(asyncio.gather(*[use(model_cache, n) for n in names]), patience()) == names
    assert library.log == ["+a", "-a", "+b", "-b", "+c"]


async def test_a_picture_s_memory_is_counted_once_for_all_models() -> None:
    """They share the engine: 4 and 4 of weights, and 2 for a picture of one of them, are 10."""
    library = Library()
    model_cache = library.model_cache(limit=3, max_bytes=10, size_of=lambda _: 4, picture=2)

    for name in ("a", "b"):
        await use(model_cache, name)

    assert library.log == ["+a", "+b"]
    assert library.memory.working_bytes == 2


async def test_models_that_one_request_needs_together_are_loaded_and_pinned_together() -> None:
    library = Library()
    model_cache = library.model_cache(limit=2, max_overtaken_s=0.0)

    async def use_both(*names: str) -> list[str]:
        async with model_cache.using_all(names) as models:
            return models

    pairs = [("a", "b"), ("c", "b"), ("a", "b"), ("c", "d")]
    done = await asyncio.wait_for(asyncio.gather(*[use_both(*pair) for pair in pairs]), patience())

    assert [tuple(models) for models in done] == pairs


async def test_models_that_do_not_fit_together_are_refused_with_their_bytes() -> None:
    library = Library()
    model_cache = library.model_cache(limit=3, max_bytes=7, size_of=lambda _: 4)

    with pytest.raises(OutOfMemory, match="beside what else its request uses"):
        async with model_cache.using_all(("a", "b")):
            pass

    assert await use(model_cache, "b") == "b"


async def test_a_failed_load_leaves_the_account_as_it_was() -> None:
    library = Library()
    model_cache = library.model_cache(limit=3, max_bytes=9, size_of=lambda _: 4, picture=1)
    await use(model_cache, "a")
    before = dict(library.memory.held), library.memory.working_bytes

    with pytest.raises(OSError, match="no such file"):
        await use(model_cache, "broken")

    assert (library.memory.held, library.memory.working_bytes) == before


async def test_a_model_is_freed_before_its_memory_is_released() -> None:
    library = Library()
    held: list[int] = []
    model_cache = library.model_cache(
        limit=1, size_of=lambda _: 4, free=lambda name: held.append(library.memory.weights_of(name))
    )
    await use(model_cache, "a")

    await use(model_cache, "b")

    assert held == [4]
    assert library.memory.weights_of("a") == 0
