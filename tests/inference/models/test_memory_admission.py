"""Admission to the device's memory: idle holders give way, what can never fit is refused with its bytes."""

from __future__ import annotations

import asyncio
from weakref import ReferenceType

import pytest

from deployments.models.device_memory import GIB, DeviceMemory, Needed
from deployments.models.memory_admission import MemoryAdmission, Outcome
from deployments.protocol.errors import OutOfMemory, Overloaded
from tests.patience import patience

MINE, LORA = ("mine", "pipeline"), ("mine", "a LoRA")


class Holder:
    """Holds one GiB for each of its names, and gives up those that are idle."""

    def __init__(self, memory: DeviceMemory, idle: list[str], used: list[str]) -> None:
        self._memory, self._idle, self.used = memory, idle, used
        for name in (*idle, *used):
            memory.record("loras", ("other", name), GIB)

    async def make_way(self, _model: str) -> Outcome:
        if self._idle:
            self.release(self._idle.pop(0))
            return "freed"
        return "in_use" if self.used else "nothing"

    def release(self, name: str) -> None:
        self._memory.release("loras", ("other", name))


def admission(wait_s: float = patience()) -> MemoryAdmission:
    """For a device of 8 GiB, 4 of which are the model's own weights."""
    made = MemoryAdmission(DeviceMemory(lambda: 8 * GIB), wait_s)
    made.memory.record("weights", MINE, 4 * GIB)
    return made


async def test_idle_holders_give_way_in_their_order_until_it_fits() -> None:
    subject = admission()
    late, first = Holder(subject.memory, ["a"], []), Holder(subject.memory, ["b", "c"], [])
    subject.add_evictor(late.make_way, "models")
    subject.add_evictor(first.make_way, "loras")

    await subject.admit("loras", LORA, Needed(3 * GIB), "the LoRA a")

    assert (subject.memory.held["weights"], subject.memory.held["loras"]) == (4 * GIB, 4 * GIB)
    assert await late.make_way("mine") == "freed"  # it was not asked


async def test_what_can_never_fit_is_refused_at_once_and_nothing_is_evicted() -> None:
    subject = admission()
    holder = Holder(subject.memory, ["a"], [])
    subject.add_evictor(holder.make_way, "loras")

    with pytest.raises(OutOfMemory, match=r"the ControlNet c needs 5.00 GiB.*at most 4.00 GiB can be freed"):
        await subject.admit("weights", ("mine", "c"), Needed(5 * GIB), "the ControlNet c")

    assert subject.memory.held["loras"] == GIB


async def test_a_request_waits_for_memory_in_use_and_gets_it() -> None:
    subject = admission()
    holder = Holder(subject.memory, [], ["a"])
    subject.add_evictor(holder.make_way, "loras")
    waiting = asyncio.create_task(subject.admit("loras", LORA, Needed(4 * GIB), "the LoRA a"))
    await asyncio.sleep(0)
    assert not waiting.done()

    holder.release(holder.used.pop())
    subject.notify()

    await asyncio.wait_for(waiting, patience())
    assert subject.memory.held["loras"] == 4 * GIB


async def test_a_request_that_waits_too_long_is_refused_for_now() -> None:
    subject = admission(wait_s=0.0)
    subject.add_evictor(Holder(subject.memory, [], ["a"]).make_way, "loras")

    with pytest.raises(Overloaded, match=r"the LoRA a needs 4.00 GiB") as refused:
        await subject.admit("loras", LORA, Needed(4 * GIB), "the LoRA a")

    assert refused.value.retryable


async def test_where_nothing_will_be_released_the_request_does_not_wait() -> None:
    subject = admission()
    subject.memory.record("loras", ("other", "stuck"), GIB)

    with pytest.raises(Overloaded):
        await asyncio.wait_for(subject.admit("loras", LORA, Needed(4 * GIB), "the LoRA a"), patience(0.1))


async def test_who_waits_keeps_no_holder_alive_that_is_unloaded() -> None:
    """A model whose LoRAs were asked first is freed while the one that needs its memory waits for that."""
    subject = admission()
    holder = Holder(subject.memory, [], [])
    undo, seen = [subject.add_evictor(holder.make_way, "loras")], ReferenceType(holder)
    subject.memory.record("weights", ("other", "model"), GIB)

    async def unload(_model: str) -> Outcome:
        undo.pop()()
        assert seen() is None
        subject.memory.release("weights", ("other", "model"))
        return "freed"

    subject.add_evictor(unload, "models")
    del holder

    await subject.admit("loras", LORA, Needed(4 * GIB), "the LoRA a")


async def test_a_request_waits_as_long_as_those_that_hold_the_memory_make_progress() -> None:
    subject = admission(wait_s=0.001)
    holder = Holder(subject.memory, [], ["a"])
    subject.add_evictor(holder.make_way, "loras")
    steps = 0

    def progress() -> int:
        """Ten windows with a step in each; then the request that held the memory has ended."""
        nonlocal steps
        steps += 1
        if steps == 20 and holder.used:
            holder.release(holder.used.pop())
            subject.notify()
        return steps

    subject.progress = progress

    await asyncio.wait_for(subject.admit("loras", LORA, Needed(4 * GIB), "the LoRA a"), patience())

    assert steps >= 20
    assert subject.waited_s(LORA) == 0


async def test_a_thread_is_admitted_on_the_event_loop() -> None:
    subject = admission()
    subject.add_evictor(Holder(subject.memory, ["a"], []).make_way, "loras")
    subject.enter_loop()

    await asyncio.to_thread(
        subject.admit_from_thread, "weights", ("mine", "c"), Needed(4 * GIB), "the ControlNet c"
    )

    assert (subject.memory.held["weights"], subject.memory.held["loras"]) == (8 * GIB, 0)


def test_without_a_loop_a_thread_gets_what_is_free() -> None:
    subject = admission()
    subject.admit_from_thread("loras", LORA, Needed(3 * GIB), "the LoRA a")

    with pytest.raises(OutOfMemory, match="not free"):
        subject.admit_from_thread("weights", ("mine", "c"), Needed(2 * GIB), "the ControlNet c")
