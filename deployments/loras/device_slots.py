"""The bounded number of LoRAs on the device: pinned while requests use them, the least recently used evicted.

Not a cachetools map: an entry in use must not be evicted, several are pinned at once or none, and a request
waits for a slot. cachetools has neither pins nor waiting.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from deployments.loras.source import Adapter
from deployments.protocol.errors import BadRequest, Overloaded


@dataclass(slots=True, eq=False)
class DeviceSlot:
    """One LoRA on the device, or on its way there. Changed by DeviceSlots and LoraCache only."""

    loading: asyncio.Task[Adapter] | None = None
    size_bytes: int = 0  # that the account of the device's memory holds for it
    users: int = 0  # requests that pin it
    stale: bool = False  # unloaded while pinned: removed with its last user

    @property
    def loaded(self) -> Adapter | None:
        """The adapter on the device; None before it is there, and after a failure."""
        task = self.loading
        if task is None or not task.done() or task.cancelled() or task.exception() is not None:
            return None
        return task.result()

    @property
    def is_loading(self) -> bool:
        """Whether the adapter is on its way to the device."""
        return self.loading is not None and not self.loading.done()

    @property
    def is_useless(self) -> bool:
        """Whether it may be removed as soon as it has no user."""
        return not self.is_loading and (self.stale or self.loaded is None)


class SlotMemory(Protocol):
    """The account of the device's memory, as far as LoRAs of one model need it."""

    async def admit(self, slot: DeviceSlot, size_bytes: int, lora_id: str) -> None:
        """Claim so many bytes; what is idle is evicted for it. Raises OutOfMemory where they can never be
        had, Overloaded where running requests do not free them in time."""

    def release(self, slot: DeviceSlot) -> None:
        """The slot's LoRA is no longer on the device."""

    def notify(self) -> None:
        """Have those that wait try again."""

    def progress(self) -> int:
        """A number that grows as running requests come nearer to their ends."""


class DeviceSlots:
    """At most `limit` slots by LoRA id, and as many bytes as `memory` admits. Used from one event loop."""

    def __init__(
        self, limit: int, *, wait_s: float, max_overtaken_s: float, memory: SlotMemory | None = None
    ) -> None:
        """wait_s: until a request without a slot is refused, while no slot is released and no request that
        runs comes nearer to its end. max_overtaken_s: how long requests whose
        LoRAs are all present may pass one that waits. memory: None: bytes have no limit."""
        self._limit = limit
        self._memory = memory
        self._wait_s = wait_s
        self._max_overtaken_s = max_overtaken_s
        self._slots: OrderedDict[str, DeviceSlot] = OrderedDict()  # the least recently used first
        self._queue = asyncio.Lock()  # held by the request that waits for slots; others queue for it
        self._waiting_since: float | None = None  # loop time
        self._released = asyncio.Event()
        self._requests: Counter[tuple[str, ...]] = Counter()  # that pin slots, by the LoRAs they pin
        self._short: set[str] = set()  # LoRAs that wait for memory
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, lora_id: str) -> DeviceSlot:
        return self._slots[lora_id]

    def values(self) -> list[DeviceSlot]:
        """A copy, so that another thread may iterate over it."""
        return list(self._slots.values())

    async def pin(self, ids: Sequence[str]) -> None:
        """Reserve slots for all of them at once, so that two requests never wait for each other.

        Raises BadRequest for more than `limit`, Overloaded when no slot is released, and nothing comes
        nearer to that, within wait_s.
        """
        if len(ids) > self._limit:
            raise BadRequest(
                f"{len(ids)} LoRAs are requested; this model holds at most {self._limit} at once",
                param="loras",
            )
        if self._may_overtake() and self._reserve(ids):
            return
        async with self._queue:
            self._waiting_since = asyncio.get_running_loop().time()
            try:
                while not self._reserve(ids):
                    await self._wait_for_release()
            except TimeoutError:
                raise Overloaded(
                    f"all {self._limit} LoRA slots are used by running requests; try again "
                    "later, or use a LoRA that others use (operators: serving.adapters_on_device)",
                    param="loras",
                    retry_after_s=self._wait_s,
                ) from None
            finally:
                self._waiting_since = None

    async def hold(self, lora_id: str, slot: DeviceSlot, size_bytes: int) -> None:
        """Have memory for this LoRA, which is about to be copied to the device.

        Raises OutOfMemory where it can never fit, Overloaded where running requests do not free enough.
        """
        if self._memory is None:
            return
        self._short.add(lora_id)
        self._memory.notify()  # what waits for the requests of this LoRA may have to give up
        try:
            await self._memory.admit(slot, size_bytes, lora_id)
        finally:
            self._short.discard(lora_id)
        slot.size_bytes = size_bytes
        if self._slots.get(lora_id) is not slot:  # unloaded meanwhile
            self._release(slot)

    def make_way(self) -> Literal["freed", "in_use", "nothing"]:
        """Evict the least recently used idle LoRA.

        "in_use": a running request will release one. "nothing": there is none, or all requests that have one
        wait for memory themselves.
        """
        for lora_id, slot in self._slots.items():
            if slot.size_bytes and not slot.users and not slot.is_loading:
                self._evict(lora_id)
                return "freed"
        for ids in self._requests:
            held = [self._slots[one].size_bytes for one in ids if one in self._slots]
            if any(held) and not self._short.intersection(ids):
                return "in_use"
        return "nothing"

    def unpin(self, ids: Sequence[str]) -> None:
        """Release what `pin` reserved."""
        self._requests[tuple(ids)] -= 1
        self._requests += Counter()  # keeps the positive ones
        for lora_id in ids:
            slot = self._slots[lora_id]
            slot.users -= 1
            self.remove_if_useless(lora_id, slot)
        self.notify()

    def remove_if_useless(self, lora_id: str, slot: DeviceSlot) -> None:
        """Remove this slot if no request uses it and it holds no adapter that one could use."""
        if not slot.users and slot.is_useless and self._slots.get(lora_id) is slot:
            self._remove(lora_id)

    def notify(self) -> None:
        """Have the waiting request check for free slots again."""
        self._released.set()
        if self._memory is not None:
            self._memory.notify()

    def unload(self, lora_id: str) -> None:
        """Remove a LoRA now, or after the last request that uses it."""
        slot = self._slots.get(lora_id)
        if slot is None:
            return
        if slot.users:
            slot.stale = True
        else:
            self._remove(lora_id)

    def clear(self) -> None:
        """Remove all slots, pinned ones too."""
        for lora_id in list(self._slots):
            self._remove(lora_id)

    async def _wait_for_release(self) -> None:
        """Raises TimeoutError after wait_s in which no slot was released and nothing came nearer to that."""
        self._released.clear()
        while True:
            before = self._progress()
            try:
                async with asyncio.timeout(self._wait_s):
                    await self._released.wait()
                return
            except TimeoutError:
                if self._progress() == before:
                    raise

    def _progress(self) -> int:
        return 0 if self._memory is None else self._memory.progress()

    def _may_overtake(self) -> bool:
        since = self._waiting_since
        return since is None or asyncio.get_running_loop().time() - since < self._max_overtaken_s

    def _reserve(self, ids: Sequence[str]) -> bool:
        """Pin these LoRAs, evicting idle ones for those that are new. Changes nothing where that is not
        possible."""
        missing = [lora_id for lora_id in ids if lora_id not in self._slots]
        idle = [
            lora_id
            for lora_id, slot in self._slots.items()
            if not slot.users and lora_id not in ids and not slot.is_loading
        ]
        excess = len(self._slots) + len(missing) - self._limit
        if excess > len(idle):
            return False
        for lora_id in idle[: max(0, excess)]:
            self._evict(lora_id)
        self._requests[tuple(ids)] += 1
        for lora_id in ids:
            slot = self._slots.setdefault(lora_id, DeviceSlot())
            slot.users += 1
            self._slots.move_to_end(lora_id)
        return True

    def _evict(self, lora_id: str) -> None:
        self._remove(lora_id)
        self.evicted += 1

    def _remove(self, lora_id: str) -> None:
        self._release(self._slots.pop(lora_id))

    def _release(self, slot: DeviceSlot) -> None:
        if self._memory is not None and slot.size_bytes:
            slot.size_bytes = 0
            self._memory.release(slot)
