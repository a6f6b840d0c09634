"""ControlNets, refiners and preprocessors: pinned while used, the least recently used idle one evicted."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from deployments.models.device_memory import PIPELINE, DeviceMemory, Needed, Thing
from deployments.models.extras import MAX_OVERTAKEN_S, Extra, Extras
from deployments.models.memory_admission import MemoryAdmission, Outcome
from deployments.protocol.errors import OutOfMemory
from tests.patience import patience


class Device:
    """Of 10 bytes, 2 of which are the model's own weights; every extra takes 3."""

    def __init__(self) -> None:
        self.now = 0.0  # seconds
        self.memory = DeviceMemory(lambda: 10)
        self.memory.record("weights", ("m", PIPELINE), 2)
        self.admission = MemoryAdmission(self.memory, patience(), lambda: self.now)
        self.admission.enter_loop()
        self.extras = Extras(self.admission)
        self.log: list[str] = []
        self.may_load = threading.Event()
        self.may_load.set()

    def extra(self, name: str, model: str = "m", size: int = 3) -> Extra:
        thing = (model, name)

        def load(beside: Any) -> None:
            self.admission.admit_from_thread("weights", thing, Needed(size), f"the net {name}", beside)
            assert self.may_load.wait(patience())
            if name == "broken":
                self.memory.release("weights", thing)
                raise OSError("no such file")
            self.log.append(f"+{name}")

        async def unload() -> None:
            await self.admission.in_unload_thread(lambda: self.log.append(f"-{name}"))
            self.memory.release("weights", thing)

        return Extra(f"the net {name}", (thing,), load, unload)

    async def claims(self, name: str) -> None:
        """Until this one asks for memory."""
        async with asyncio.timeout(patience()):
            while ("m", name) not in self.admission._waiting_since:  # noqa: ASYNC110  no event is set
                await asyncio.sleep(0)

    async def use(self, *wanted: Extra) -> None:
        async with self.extras.using(wanted):
            pass


async def test_the_least_recently_used_idle_one_makes_way() -> None:
    device = Device()
    a, b, c = (device.extra(name) for name in "abc")

    for wanted in (a, b, a, c):
        await device.use(wanted)

    assert device.log == ["+a", "+b", "-b", "+c"]
    assert device.memory.held["weights"] == 2 + 3 + 3
    assert device.extras.evicted == {"m": 1}


async def test_one_in_use_stays_and_the_next_one_waits_for_it() -> None:
    device = Device()
    a, b, c = (device.extra(name) for name in "abc")

    async with device.extras.using([a, b]):
        waiting = asyncio.create_task(device.use(c))
        await asyncio.to_thread(lambda: None)
        await device.use(b)
        assert device.log == ["+a", "+b"]

    await asyncio.wait_for(waiting, patience())
    assert device.log == ["+a", "+b", "-a", "+c"]


@pytest.mark.parametrize(("waited_s", "passes"), [(MAX_OVERTAKEN_S, True), (MAX_OVERTAKEN_S + 1, False)])
async def test_one_that_is_always_in_use_does_not_keep_another_waiting_for_ever(
    waited_s: float, passes: bool
) -> None:
    device = Device()
    busy, wanted = device.extra("busy", size=6), device.extra("wanted", size=6)
    async with device.extras.using([busy]):
        waiting = asyncio.create_task(device.use(wanted))
        await device.claims("wanted")
        device.now += waited_s
        late = asyncio.create_task(device.use(busy))
        for _ in range(3):
            await asyncio.sleep(0)
        assert late.done() is passes

    await asyncio.wait_for(asyncio.gather(waiting, late), patience())

    assert device.log == ["+busy", "-busy", "+wanted"] + ([] if passes else ["-wanted", "+busy"])


async def test_one_that_waits_for_what_a_later_request_holds_is_passed_in_the_end() -> None:
    """They would wait for each other for ever: the later one has a LoRA on the device."""
    device = Device()
    device.admission.wait_s = 0.001
    device.admission.progress = iter(range(10**9)).__next__  # others run
    busy, wanted = device.extra("busy"), device.extra("wanted")
    device.memory.record("loras", ("m", "a LoRA"), 5)
    lora_in_use = True

    async def make_way(_model: str) -> Outcome:
        if lora_in_use:
            return "in_use"
        device.memory.release("loras", ("m", "a LoRA"))
        return "freed"

    device.admission.add_evictor(make_way, "loras")
    async with device.extras.using([busy]):
        waiting = asyncio.create_task(device.use(wanted))
        await device.claims("wanted")
        device.now += MAX_OVERTAKEN_S + 1
        await asyncio.wait_for(device.use(busy), patience())
        assert not waiting.done()
    lora_in_use = False
    device.admission.notify()

    await asyncio.wait_for(waiting, patience())


async def test_what_its_request_holds_already_is_not_waited_for() -> None:
    device = Device()
    device.memory.record("loras", ("m", "its LoRA"), 6)

    with pytest.raises(OutOfMemory, match="beside what else its request uses"):
        async with device.extras.using([device.extra("a")], [("m", "its LoRA")]):
            pass


async def test_what_does_not_fit_beside_the_other_of_its_request_is_refused_at_once() -> None:
    device = Device()
    first, second = device.extra("first", size=5), device.extra("second", size=4)

    with pytest.raises(OutOfMemory, match=r"the net second .* beside what else its request uses"):
        await asyncio.wait_for(device.use(first, second), patience())

    assert not first.users
    await asyncio.wait_for(device.use(second), patience())
    assert device.log == ["+first", "-first", "+second"]


async def test_a_failed_load_leaves_nothing_pinned_or_claimed() -> None:
    device = Device()
    a = device.extra("a")

    with pytest.raises(OSError, match="no such file"):
        await device.use(a, device.extra("broken"))

    assert not a.users
    assert device.memory.held["weights"] == 2 + 3


async def test_a_cancelled_request_ends_when_what_it_loads_is_there_and_unpins_it() -> None:
    device = Device()
    device.may_load.clear()
    a = device.extra("a")
    request = asyncio.create_task(device.use(a))
    await asyncio.sleep(0)
    request.cancel()
    await asyncio.sleep(0)
    assert not request.done()

    device.may_load.set()
    await asyncio.wait([request])

    assert request.cancelled()
    assert not a.users
    assert device.log == ["+a"]


async def test_memory_is_freed_though_all_other_threads_wait_for_it() -> None:
    """The threads of the loop are few, on a machine of few cores."""
    device = Device()
    with ThreadPoolExecutor(1) as only_thread:
        asyncio.get_running_loop().set_default_executor(only_thread)
        for name in ("a", "b"):
            await device.use(device.extra(name))

        await asyncio.wait_for(device.use(device.extra("c")), patience())

    assert device.log == ["+a", "+b", "-a", "+c"]


async def test_those_of_a_model_that_is_unloaded_are_forgotten() -> None:
    device = Device()
    a = device.extra("a")
    other = device.extra("other", model="n")
    await device.use(a)
    await device.use(other)

    await device.extras.forget("m")
    device.memory.release_model("m")

    assert await device.extras.make_way("n") == "freed"
    assert await device.extras.make_way("n") == "nothing"
    assert device.log == ["+a", "+other", "-other"]
    await device.use(a)
    assert device.log[-1] == "+a"


async def test_one_that_is_leaving_is_loaded_again_after_it_has_left() -> None:
    device = Device()
    left = asyncio.Event()
    thing: Thing = ("m", "a")
    a = device.extra("a")
    unload = a.unload

    async def slow_unload() -> None:
        await left.wait()
        await unload()

    a.unload = slow_unload
    await device.use(a)
    leaving = asyncio.create_task(device.extras.make_way("m"))
    await asyncio.sleep(0)
    again = asyncio.create_task(device.use(a))
    await asyncio.sleep(0)
    left.set()

    await asyncio.wait_for(asyncio.gather(leaving, again), patience())

    assert device.log == ["+a", "-a", "+a"]
    assert device.memory.held["weights"] == 2 + 3
    assert device.memory.most_bytes(thing) == 8
