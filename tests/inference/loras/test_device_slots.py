"""Slots of LoRAs on the device: pinned all at once, evicted when idle, waited for in order."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any
from unittest.mock import MagicMock

import pytest

from deployments.loras.device_slots import DeviceSlots, SlotMemory
from deployments.protocol.errors import BadRequest, Overloaded
from tests.patience import patience

PATIENCE_S = patience(2)


def slots(limit: int = 2, wait_s: float = PATIENCE_S, max_overtaken_s: float = PATIENCE_S) -> DeviceSlots:
    return DeviceSlots(limit, wait_s=wait_s, max_overtaken_s=max_overtaken_s)


async def load(slots: DeviceSlots, lora_id: str) -> None:
    """As LoraCache does it: the slot's task ends with an adapter."""
    adapter: Any = object()
    slots[lora_id].loading = asyncio.ensure_future(asyncio.sleep(0, adapter))
    await slots[lora_id].loading


async def test_the_least_recently_used_idle_slot_is_evicted() -> None:
    subject = slots(limit=2)
    for lora_id in ("a", "b", "a", "c"):
        await subject.pin([lora_id])
        await load(subject, lora_id)
        subject.unpin([lora_id])

    with pytest.raises(KeyError):
        subject["b"]
    assert subject["a"].loaded is not None
    assert (len(subject), subject.evicted) == (2, 1)


async def test_a_request_gets_all_its_slots_or_none() -> None:
    subject = slots(limit=2, wait_s=0.0)
    await subject.pin(["a"])

    with pytest.raises(Overloaded, match="all 2 LoRA slots are used"):
        await subject.pin(["b", "c"])

    assert len(subject) == 1
    with pytest.raises(BadRequest, match="at most 2"):
        await subject.pin(["b", "c", "d"])


async def test_a_slot_that_is_loading_is_not_evicted() -> None:
    subject = slots(limit=1, wait_s=0.0)
    await subject.pin(["a"])
    subject["a"].loading = asyncio.ensure_future(asyncio.sleep(3600))
    subject.unpin(["a"])

    with pytest.raises(Overloaded):
        await subject.pin(["b"])

    subject["a"].loading.cancel()


@pytest.mark.parametrize(("max_overtaken_s", "passes"), [(PATIENCE_S, True), (0.0, False)])
async def test_a_waiting_request_is_overtaken_for_a_limited_time(
    max_overtaken_s: float, passes: bool
) -> None:
    subject = slots(limit=2, max_overtaken_s=max_overtaken_s)
    await subject.pin(["a", "b"])
    waiting = asyncio.ensure_future(subject.pin(["c"]))
    await asyncio.sleep(0)
    second = asyncio.ensure_future(subject.pin(["a"]))  # present, so it needs no free slot
    await asyncio.sleep(0)

    assert second.done() is passes
    assert not waiting.done()

    subject.unpin(["a", "b"])
    subject.unpin(["a"] if passes else [])
    await asyncio.wait_for(asyncio.gather(waiting, second), PATIENCE_S)


async def test_a_request_waits_for_a_slot_as_long_as_others_make_progress() -> None:
    memory = MagicMock(spec=SlotMemory)
    subject = DeviceSlots(1, wait_s=0.001, max_overtaken_s=PATIENCE_S, memory=memory)
    await subject.pin(["a"])
    steps = itertools.count()

    def progress() -> int:
        """A step in each of ten windows; then the request that has the slot has ended."""
        step = next(steps)
        if step == 19:
            subject.unpin(["a"])
        return step

    memory.progress = progress

    await asyncio.wait_for(subject.pin(["b"]), PATIENCE_S)

    assert next(steps) >= 20


async def test_a_failed_load_leaves_no_slot() -> None:
    subject = slots()
    await subject.pin(["a"])
    subject["a"].loading = asyncio.ensure_future(asyncio.sleep(3600))
    subject["a"].loading.cancel()
    await asyncio.sleep(0)

    subject.unpin(["a"])

    assert len(subject) == 0


async def test_an_unloaded_slot_stays_until_its_last_user_ends() -> None:
    subject = slots()
    await subject.pin(["a"])
    await load(subject, "a")
    subject.unload("a")
    assert len(subject) == 1

    subject.unpin(["a"])

    assert len(subject) == 0
