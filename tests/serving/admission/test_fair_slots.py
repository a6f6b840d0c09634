"""Slots that owners share: what one owner waits for stands in the way of no other."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from deployments.protocol.errors import Overloaded
from serve_app.admission.fair_slots import FairSlots
from tests.patience import patience


async def test_an_owner_at_its_share_waits_while_others_go_on() -> None:
    slots = FairSlots(total=4, per_owner=2, wait_s=patience(), work="downloads")
    async with AsyncExitStack() as held:
        for _ in range(2):
            await held.enter_async_context(slots.hold("ann"))
        third = asyncio.create_task(held.enter_async_context(slots.hold("ann")))
        async with slots.hold("bob"), slots.hold("bob"):
            assert not third.done()
        assert not third.done()
        await held.aclose()
        await third
        await held.aclose()


async def test_all_slots_together_are_bounded_and_those_who_wait_are_served_in_their_order() -> None:
    slots = FairSlots(total=2, per_owner=2, wait_s=patience(), work="downloads")
    order: asyncio.Queue[str] = asyncio.Queue()
    gates = {name: asyncio.Event() for name in "abcd"}

    async def work(name: str) -> None:
        async with slots.hold(name):
            order.put_nowait(name)
            await gates[name].wait()

    tasks = [asyncio.create_task(work(name)) for name in "abcd"]
    first = [await order.get(), await order.get()]
    none_further = order.empty()
    gates["b"].set()
    third = await order.get()
    for gate in gates.values():
        gate.set()
    await asyncio.gather(*tasks)

    assert (first, none_further, third, await order.get()) == (["a", "b"], True, "c", "d")


async def test_who_waits_too_long_is_refused_with_the_reason_and_holds_nothing() -> None:
    slots = FairSlots(total=3, per_owner=1, wait_s=0.01, work="downloads of LoRAs")

    async with slots.hold("ann"):
        with pytest.raises(Overloaded, match="1 downloads of LoRAs of yours are in progress") as own:
            await slots.hold("ann").__aenter__()
        async with slots.hold("bob"), slots.hold("cy"):
            with pytest.raises(Overloaded, match="3 downloads of LoRAs are in progress"):
                await slots.hold("dan").__aenter__()

    assert own.value.retry_after_s
    async with slots.hold("ann"), slots.hold("bob"), slots.hold("dan"):
        pass


async def test_a_cancelled_wait_takes_no_slot_and_wakes_no_one_in_vain() -> None:
    slots = FairSlots(total=1, per_owner=1, wait_s=patience(), work="downloads")

    async with slots.hold("ann"):
        waiting = asyncio.create_task(slots.hold("bob").__aenter__())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    async with slots.hold("bob"):
        pass

    assert waiting.cancelled()


async def test_a_free_slot_goes_to_the_owner_who_holds_the_fewest() -> None:
    slots = FairSlots(total=2, per_owner=2, wait_s=patience(), work="pictures")
    order: asyncio.Queue[str] = asyncio.Queue()

    async def work(owner: str, name: str) -> None:
        async with slots.hold(owner):
            order.put_nowait(name)
            await asyncio.sleep(0)

    await asyncio.gather(*(work("ann", f"ann{n}") for n in range(4)), work("bob", "bob"))

    assert [order.get_nowait() for _ in range(3)] == ["ann0", "ann1", "bob"]


async def test_a_slot_granted_to_a_caller_who_is_cancelled_at_that_moment_is_free_again() -> None:
    slots = FairSlots(total=1, per_owner=1, wait_s=patience(), work="pictures")
    held = slots.hold("ann")
    await held.__aenter__()
    waiting = asyncio.create_task(slots.hold("bob").__aenter__())
    await asyncio.sleep(0)
    await held.__aexit__(None, None, None)  # grants bob the slot before he runs
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)

    async with slots.hold("cy"):
        pass

    assert waiting.cancelled()
