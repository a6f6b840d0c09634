"""The adapters of one model on one replica: converted in host memory, on the device, pinned while used."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from deployments.loras.batched_lora import BatchedLora, LoraSet, mix
from deployments.loras.file_reader import LoraFileReader
from deployments.loras.source import Adapter, LowRankFactors, layer_shapes, read_lora
from deployments.protocol.errors import BadRequest, Overloaded
from deployments.protocol.request import Lora

logger = logging.getLogger(__name__)

MIB = 2**20
NICENESS = 10  # of the thread that reads and converts: steps of others go first

OnEngine = Callable[[Callable[[], Any]], Awaitable[Any]]  # runs a function between two forwards


@dataclass(frozen=True, slots=True)
class LoraCacheLimits:
    """How many adapters, and how much of them, a bank holds."""

    on_device: int = 8
    in_memory: int = 64
    memory_bytes: int = 4096 * MIB
    wait_s: float = 60.0  # for a slot on the device; then the request is refused
    patience_s: float = 1.0  # of who waits; then even those whose adapters are there queue up behind


@dataclass(slots=True, eq=False)
class _DeviceSlot:
    """One adapter on the device, or on its way there."""

    arrival: asyncio.Task[Adapter] | None = None
    users: int = 0
    doomed: bool = False  # unloaded while in use: goes with its last user


@dataclass(slots=True)
class _ActiveSet:
    mix: asyncio.Task[LoraSet]
    users: int = 0


@dataclass(frozen=True, slots=True)
class CacheUsage:
    """What a bank holds right now."""

    on_device: int
    device_bytes: int
    in_memory: int
    memory_bytes: int
    stacked_bytes: int  # copies for the batches at hand, on the device


@dataclass(slots=True)
class _HostCache:
    """Converted adapters on the host, the least recently used out first."""

    room: LoraCacheLimits
    adapters: OrderedDict[str, Adapter] = field(default_factory=OrderedDict)
    size_bytes: int = 0

    def get(self, digest: str) -> Adapter | None:
        if digest in self.adapters:
            self.adapters.move_to_end(digest)
        return self.adapters.get(digest)

    def put(self, digest: str, adapter: Adapter) -> None:
        self.drop(digest)
        self.adapters[digest] = adapter
        self.size_bytes += adapter.size_bytes
        while len(self.adapters) > self.room.in_memory or self.size_bytes > self.room.memory_bytes:
            self.drop(next(iter(self.adapters)))

    def drop(self, digest: str) -> None:
        adapter = self.adapters.pop(digest, None)
        if adapter is not None:
            self.size_bytes -= adapter.size_bytes


@dataclass(slots=True)
class CacheStats:
    """What a bank did so far."""

    on_device: int = 0  # wished for when on the device, or on the way there
    in_memory: int = 0  # wished for when converted in host memory
    from_files: int = 0  # read and converted
    evicted: int = 0  # from the device, for others


class LoraCache:
    """Used from one event loop; reading, converting and copying run in a thread of its own."""

    def __init__(
        self,
        pipeline: Any,
        batched_lora: BatchedLora,
        device: torch.device,
        files: LoraFileReader,
        room: LoraCacheLimits | None = None,
    ) -> None:
        """pipeline: whose layers the adapters change. files: of adapters that requests only name."""
        self._pipeline = pipeline
        self._batched_lora = batched_lora
        self._device = device
        self._files = files
        self._room = room or LoraCacheLimits()
        self._memory = _HostCache(self._room)
        self._slots: OrderedDict[str, _DeviceSlot] = OrderedDict()
        self._active: dict[Hashable, _ActiveSet] = {}
        self.stats = CacheStats()
        self._turn = asyncio.Lock()  # of the one that waits for a slot
        self._waiting_since: float | None = None
        self._released = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapters", initializer=_step_back)
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the layers that an adapter may change; see adapter_shapes."""
        return layer_shapes(self._pipeline)

    @property
    def usage(self) -> CacheUsage:
        """May be asked from any thread."""
        arrivals = [slot.arrival for slot in list(self._slots.values()) if _has_arrived(slot)]
        present = [arrival.result() for arrival in arrivals if arrival is not None]
        return CacheUsage(
            len(self._slots),
            sum(adapter.size_bytes for adapter in present),
            len(self._memory.adapters),
            self._memory.size_bytes,
            self._batched_lora.stacked_bytes,
        )

    @asynccontextmanager
    async def using(self, loras: Sequence[Lora], on_engine: OnEngine) -> AsyncGenerator[LoraSet | None]:
        """The owner of a request's rows while the block runs; None without adapters that change anything.

        Raises BadRequest for a file that is refused, NotFound for one that nobody has, Overloaded when no
        slot on the device comes free in time.
        """
        if not loras:
            yield None
            return
        names = [lora.id for lora in loras]
        await self._pin(names)
        key = tuple((lora.id, lora.weight) for lora in loras)
        active: _ActiveSet | None = None
        try:
            arrivals = [self._arrival(lora, on_engine) for lora in loras]
            adapters = [await asyncio.shield(arrival) for arrival in arrivals]
            active = self._active.get(key)
            if active is None:
                active = self._active[key] = _ActiveSet(asyncio.ensure_future(self._mixed(key, adapters)))
            active.users += 1
            owner = await asyncio.shield(active.mix)
            yield owner if owner.pairs else None
        finally:
            if active is not None:
                self._take_off(key, active)
            self._unpin(names)

    def unload(self, digest: str) -> None:
        """Forget an adapter; requests that use it now keep it to their end."""
        self._memory.drop(digest)
        slot = self._slots.get(digest)
        if slot is None:
            return
        if slot.users:
            slot.doomed = True
        else:
            del self._slots[digest]

    def close(self) -> None:
        """Let everything go; nobody uses the model any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._slots.clear()
        self._memory.adapters.clear()

    # ---- slots on the device ----

    async def _pin(self, names: Sequence[str]) -> None:
        """Reserve slots for all of them at once, so that two requests never wait for each other."""
        if len(names) > self._room.on_device:
            raise BadRequest(
                f"{len(names)} LoRAs are wanted; this model holds at most {self._room.on_device} at once",
                param="loras",
            )
        if self._may_pass() and self._reserve(names):
            return
        async with self._turn:
            now = asyncio.get_running_loop().time
            self._waiting_since = now()
            try:
                async with asyncio.timeout(self._room.wait_s):
                    while not self._reserve(names):
                        self._released.clear()
                        await self._released.wait()
            except TimeoutError:
                raise Overloaded(
                    f"all {self._room.on_device} places for LoRAs are taken by running requests; try again "
                    "later, or use a LoRA that others use (operators: serving.adapters_on_device)",
                    param="loras",
                    retry_after_s=self._room.wait_s,
                ) from None
            finally:
                self._waiting_since = None

    def _may_pass(self) -> bool:
        since = self._waiting_since
        return since is None or asyncio.get_running_loop().time() - since < self._room.patience_s

    def _reserve(self, names: Sequence[str]) -> bool:
        """Pin these adapters, evicting idle ones for those that are new; nothing happens if that fails."""
        missing = [name for name in names if name not in self._slots]
        idle = [
            name
            for name, slot in self._slots.items()
            if not slot.users and name not in names and (slot.arrival is None or slot.arrival.done())
        ]
        excess = len(self._slots) + len(missing) - self._room.on_device
        if excess > len(idle):
            return False
        for name in idle[: max(0, excess)]:
            del self._slots[name]
            self.stats.evicted += 1
        for name in names:
            slot = self._slots.setdefault(name, _DeviceSlot())
            slot.users += 1
            self._slots.move_to_end(name)
        return True

    def _unpin(self, names: Sequence[str]) -> None:
        for name in names:
            slot = self._slots[name]
            slot.users -= 1
            if not slot.users and (slot.doomed or not _has_arrived(slot)) and not _is_coming(slot):
                del self._slots[name]
        self._released.set()

    # ---- the way to the device ----

    def _arrival(self, lora: Lora, on_engine: OnEngine) -> asyncio.Task[Adapter]:
        """The one loading of this adapter, for all who wait for it; it outlives those who give up."""
        slot = self._slots[lora.id]
        if slot.arrival is None or (slot.arrival.done() and not _has_arrived(slot)):
            slot.arrival = asyncio.ensure_future(self._load(lora, on_engine))
            slot.arrival.add_done_callback(lambda task: self._has_settled(lora.id, slot, task))
        else:
            self.stats.on_device += 1
        return slot.arrival

    def _has_settled(self, name: str, slot: _DeviceSlot, task: asyncio.Task[Adapter]) -> None:
        if not task.cancelled():
            task.exception()  # seen by those who wait, if anybody still does
        useless = slot.doomed or not _has_arrived(slot)
        if not slot.users and useless and self._slots.get(name) is slot:
            del self._slots[name]
        self._released.set()

    async def _load(self, lora: Lora, on_engine: OnEngine) -> Adapter:
        adapter = self._memory.get(lora.id)
        if adapter is None:
            file = lora.file if lora.file is not None else await self._files.read(lora.id)
            adapter = await self._in_thread(_read_checked, file, lora.id, self._pipeline)
            self._memory.put(lora.id, adapter)
            self.stats.from_files += 1
        else:
            self.stats.in_memory += 1
        on_device: Adapter = await self._in_thread(self._copied, adapter)
        if not self._batched_lora.has_hooks(on_device.factors):
            await on_engine(lambda: self._batched_lora.hook(on_device.factors))
        logger.info("LoRA loaded", extra={"lora": lora.id, "bytes": on_device.size_bytes})
        return on_device

    async def _mixed(self, key: Hashable, adapters: Sequence[Adapter]) -> LoraSet:
        weights = [weight for _, weight in key] if isinstance(key, tuple) else []
        parts = [
            (adapter.factors, weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if weight  # one of weight 0 is as good as none
        ]
        made: LoraSet = await self._in_thread(self._put_together, parts, key)
        return made

    def _put_together(
        self, parts: Sequence[tuple[Mapping[Any, LowRankFactors], float]], key: Hashable
    ) -> LoraSet:
        with torch.inference_mode():
            return mix(parts, label=key)

    def _take_off(self, key: Hashable, active: _ActiveSet) -> None:
        active.users -= 1
        if active.users:
            return
        del self._active[key]
        active.mix.cancel()
        if active.mix.done() and not active.mix.cancelled() and active.mix.exception() is None:
            self._batched_lora.forget(active.mix.result())

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _copied(self, adapter: Adapter) -> Adapter:
        """The adapter on the device. Copied on a stream of its own, so that no step waits for it."""
        if self._device.type == "cpu":
            return adapter
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            factors = {place: self._copied_factors(one) for place, one in adapter.factors.items()}
        if self._stream is not None:
            self._stream.synchronize()
            for one in factors.values():  # engine's stream reads them: no reuse of their memory before
                one.a.record_stream(torch.cuda.default_stream(self._device))
                one.b.record_stream(torch.cuda.default_stream(self._device))
        return replace(adapter, factors=factors)

    def _copied_factors(self, one: LowRankFactors) -> LowRankFactors:
        return replace(one, a=one.a.to(self._device), b=one.b.to(self._device))


def _has_arrived(slot: _DeviceSlot) -> bool:
    task = slot.arrival
    return task is not None and task.done() and not task.cancelled() and task.exception() is None


def _is_coming(slot: _DeviceSlot) -> bool:
    return slot.arrival is not None and not slot.arrival.done()


def _read_checked(file: bytes, digest: str, pipeline: Any) -> Adapter:
    if hashlib.sha256(file).hexdigest() != digest:
        raise BadRequest(f"the LoRA's SHA-256 is not {digest}; upload it again", param="loras")
    with torch.inference_mode():
        return read_lora(file, pipeline)


def _step_back() -> None:
    """Lower this thread's priority; on Linux a thread has one of its own."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
