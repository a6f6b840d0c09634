"""The LoRAs of one model on one replica: converted on the host, copied to the device, pinned while used."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from cachetools import LRUCache
from torch import Tensor

from deployments.engine.device_streams import engine_stream
from deployments.engine.out_of_memory import load_or_free
from deployments.lora_format.layer_names import LayerKey, LayerNames
from deployments.loras.batched_lora import BatchedLora
from deployments.loras.device_slots import DeviceSlot, DeviceSlots, SlotMemory
from deployments.loras.file_reader import LoraFileReader, check_digest
from deployments.loras.lora_set import LoraSet, combine
from deployments.loras.rescale import Magnitude, ReadWeight, Rescale, rescales, stored_weight
from deployments.loras.source import Adapter, layer_shapes, read_lora
from deployments.loras.upload import upload
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import Lora

logger = logging.getLogger(__name__)

MIB = 2**20
CURE = "use fewer or smaller LoRAs, or try again when less is running; operators: fewer adapters_on_device"
COPIES = 2  # of a LoRA's factors on the device: as they are in the file, and stacked for a batch
LAYERS_AT_ONCE = 16  # of a DoRA, measured between two forwards: running requests wait for them
NICENESS = 10  # of the thread that reads and converts: the steps of running requests go first

OnEngine = Callable[[Callable[[], Any]], Awaitable[Any]]  # runs a function between two forwards
_SetKey = tuple[tuple[str, float], ...]  # (LoRA id, weight) in the order of the request


@dataclass(frozen=True, slots=True)
class LoraCacheLimits:
    """How many LoRAs, and how many bytes of them, a LoraCache holds."""

    on_device: int = 8
    in_memory: int = 64
    memory_bytes: int = 4096 * MIB
    wait_s: float = 60.0  # for a slot on the device; then the request is refused
    max_overtaken_s: float = 1.0  # a waiting request may be passed by those whose LoRAs are on the device


@dataclass(frozen=True, slots=True)
class CacheUsage:
    """What a LoraCache holds right now."""

    on_device: int  # LoRAs
    device_bytes: int
    in_memory: int  # LoRAs
    memory_bytes: int
    stacked_bytes: int  # device copies for the current batches


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What a LoraCache has done since it was created."""

    on_device: int  # requested when on the device, or on the way there
    in_memory: int  # requested when converted in host memory
    from_files: int  # read and converted
    evicted: int  # from the device, for others


@dataclass(slots=True)
class _ActiveSet:
    """A LoRA set that running requests share."""

    building: asyncio.Task[LoraSet]
    users: int = 0


class _HostCache:
    """Converted LoRAs in host memory, the least recently used evicted; bounded by number and by bytes."""

    def __init__(self, limits: LoraCacheLimits) -> None:
        self._max_entries = limits.in_memory
        self._adapters: LRUCache[str, Adapter] = LRUCache(
            limits.memory_bytes, getsizeof=lambda adapter: adapter.size_bytes
        )

    def __len__(self) -> int:
        return len(self._adapters)

    @property
    def size_bytes(self) -> int:
        """Of all adapters in host memory."""
        return int(self._adapters.currsize)

    def get(self, lora_id: str) -> Adapter | None:
        """The adapter, which becomes the most recently used; None where it is not cached."""
        return self._adapters.get(lora_id)

    def put(self, lora_id: str, adapter: Adapter) -> None:
        """Add it; one that is over memory_bytes alone is not kept."""
        with suppress(ValueError):  # cachetools' "value too large"
            self._adapters[lora_id] = adapter
        while len(self._adapters) > self._max_entries:
            self._adapters.popitem()

    def remove(self, lora_id: str) -> None:
        self._adapters.pop(lora_id, None)

    def clear(self) -> None:
        self._adapters.clear()


class LoraCache:
    """Used from one event loop; reading, converting and copying run in a thread of its own."""

    def __init__(
        self,
        pipeline: Any,
        batched_lora: BatchedLora,
        device: torch.device,
        files: LoraFileReader,
        limits: LoraCacheLimits | None = None,
        memory: SlotMemory | None = None,
        read_weight: ReadWeight = stored_weight,
        *,
        unchanged: Collection[str] = (),
    ) -> None:
        """pipeline: whose layers the LoRAs change. files: of LoRAs that a request names without sending
        the file. memory: admits LoRAs to the device; None: by number only. read_weight: of a layer, for
        DoRAs. unchanged: components that compute on the CPU, where no factors are."""
        limits = limits or LoraCacheLimits()
        self._pipeline = pipeline
        self._unchanged = unchanged
        self._batched_lora = batched_lora
        self._device = device
        self._files = files
        self._read_weight = read_weight
        self._names: LayerNames | None = None
        self._host = _HostCache(limits)
        self._slots = DeviceSlots(
            limits.on_device, wait_s=limits.wait_s, max_overtaken_s=limits.max_overtaken_s, memory=memory
        )
        self._active: dict[_SetKey, _ActiveSet] = {}
        self._device_hits, self._host_hits, self._file_reads = 0, 0, 0
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="loras", initializer=_lower_priority_of_this_thread
        )
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the layers that a LoRA may change, as source.layer_shapes gives them."""
        return layer_shapes(self._pipeline)

    @property
    def usage(self) -> CacheUsage:
        """May be called from any thread."""
        loaded = [slot.loaded for slot in self._slots.values()]
        return CacheUsage(
            on_device=len(loaded),
            device_bytes=sum(adapter.size_bytes for adapter in loaded if adapter is not None),
            in_memory=len(self._host),
            memory_bytes=self._host.size_bytes,
            stacked_bytes=self._batched_lora.stacked_bytes,
        )

    @property
    def stats(self) -> CacheStats:
        """May be called from any thread."""
        return CacheStats(self._device_hits, self._host_hits, self._file_reads, self._slots.evicted)

    @asynccontextmanager
    async def using(self, loras: Sequence[Lora], on_engine: OnEngine) -> AsyncGenerator[LoraSet | None]:
        """The LoRA set of a request while the block runs; None where no LoRA changes anything.

        Requests with the same LoRAs and weights at the same time share one set. Raises BadRequest for a file
        that is refused, NotFound for one that is not stored, OutOfMemory for one that the device cannot hold,
        Overloaded when no slot on the device, or not enough of its memory, is released in time.
        """
        if not loras:
            yield None
            return
        ids = [lora.id for lora in loras]
        await self._slots.pin(ids)
        key = tuple((lora.id, lora.weight) for lora in loras)
        active: _ActiveSet | None = None
        try:
            loading = [self._start_or_join_loading(lora, on_engine) for lora in loras]
            adapters = [await asyncio.shield(task) for task in loading]
            active = self._active.get(key)
            if active is None:
                active = self._active[key] = _ActiveSet(
                    asyncio.ensure_future(self._build_set(key, adapters, on_engine))
                )
            active.users += 1
            lora_set = await asyncio.shield(active.building)
            yield None if lora_set.changes_nothing else lora_set
        finally:
            if active is not None:
                self._release_set(key, active)
            self._slots.unpin(ids)

    def without_effect(self, loras: Sequence[Lora]) -> list[Lora]:
        """Those of these, which a request is `using`, that change nothing: they hold only zeros."""
        loaded = [(lora, self._slots[lora.id].loaded) for lora in loras]
        return [lora for lora, adapter in loaded if adapter is not None and not adapter.factors]

    def slots_of(self, loras: Sequence[Lora]) -> list[DeviceSlot]:
        """Those that a request is `using`."""
        return [self._slots[lora.id] for lora in loras]

    async def make_way(self) -> Literal["freed", "in_use", "nothing"]:
        """Evict an idle LoRA from the device; see DeviceSlots.make_way."""
        return self._slots.make_way()

    def unload(self, lora_id: str) -> None:
        """Remove a LoRA; requests that use it now keep it to their end."""
        self._host.remove(lora_id)
        self._slots.unload(lora_id)

    def close(self) -> None:
        """Free all LoRAs. To be called when no request uses the model any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._slots.clear()
        self._host.clear()

    # ---- loading ----

    def _start_or_join_loading(self, lora: Lora, on_engine: OnEngine) -> asyncio.Task[Adapter]:
        """The one task that loads this LoRA for all requests; it goes on when those that await it are
        cancelled."""
        slot = self._slots[lora.id]
        if slot.loading is None or (not slot.is_loading and slot.loaded is None):
            slot.loading = asyncio.ensure_future(self._load(lora, slot, on_engine))
            slot.loading.add_done_callback(lambda task: self._on_loaded(lora.id, slot, task))
        else:
            self._device_hits += 1
        return slot.loading

    def _on_loaded(self, lora_id: str, slot: DeviceSlot, task: asyncio.Task[Adapter]) -> None:
        if not task.cancelled():
            task.exception()  # retrieved here in case no request awaits it any more
        self._slots.remove_if_useless(lora_id, slot)
        self._slots.notify()

    async def _load(self, lora: Lora, slot: DeviceSlot, on_engine: OnEngine) -> Adapter:
        what = f"the LoRA {lora.id[:12]}"
        adapter = self._host.get(lora.id)
        if adapter is None:
            file = lora.file if lora.file is not None else await self._files.read(lora.id)
            if self._names is None:
                self._names = await self._in_thread(lambda: LayerNames(self.layers))
            read = partial(_read_checked, file, lora.id, self._pipeline, self._names)
            adapter = await self._in_thread(
                partial(load_or_free, what, read, len(file), cure=CURE, param="loras")
            )
            self._check_places(adapter)
            self._host.put(lora.id, adapter)
            self._file_reads += 1
        else:
            self._host_hits += 1
        await self._slots.hold(lora.id, slot, COPIES * adapter.size_bytes)
        copy = partial(self._copy_to_device, adapter)
        on_device: Adapter = await self._in_thread(
            partial(load_or_free, what, copy, adapter.size_bytes, cure=CURE, param="loras")
        )
        if not self._batched_lora.has_hooks(on_device.factors):
            await on_engine(lambda: self._batched_lora.hook(on_device.factors))
        if on_device.magnitudes:
            on_device = await self._with_rescales(on_device, on_engine)
        logger.info("LoRA loaded", extra={"lora": lora.id, "bytes": on_device.size_bytes})
        return on_device

    def _check_places(self, adapter: Adapter) -> None:
        """Raises BadRequest for a LoRA with factors for a component that computes on the CPU."""
        found = sorted({part for part, _ in adapter.factors}.intersection(self._unchanged))
        if found:
            raise BadRequest(
                f"the LoRA changes {', '.join(found)}, which computes on the CPU here, without LoRAs; use "
                "one that changes the denoiser alone (operators: offload: text_encoders in the card)",
                param="loras",
            )

    async def _with_rescales(self, adapter: Adapter, on_engine: OnEngine) -> Adapter:
        """A DoRA with the lengths of the model's rows, measured for a few layers between two forwards."""
        layers = list(adapter.magnitudes)
        rescaled: dict[LayerKey, Rescale] = {}
        for first in range(0, len(layers), LAYERS_AT_ONCE):
            some = {key: adapter.magnitudes[key] for key in layers[first : first + LAYERS_AT_ONCE]}
            measure = partial(self._measure, some, adapter)
            rescaled |= await on_engine(measure)
        return replace(adapter, rescales=rescaled)

    def _measure(self, some: Mapping[LayerKey, Magnitude], adapter: Adapter) -> dict[LayerKey, Rescale]:
        with torch.inference_mode():
            return rescales(some, adapter.factors, self._batched_lora.parts, self._read_weight)

    async def _build_set(self, key: _SetKey, adapters: Sequence[Adapter], on_engine: OnEngine) -> LoraSet:
        used = [
            (adapter, weight)
            for adapter, (_, weight) in zip(adapters, key, strict=True)
            if weight  # 0: without effect
        ]
        parts = [(adapter.factors, weight) for adapter, weight in used]
        owner = self._batched_lora
        if not any(adapter.rescales for adapter, _ in used):
            return combine(parts, label=key, owner=owner)
        rescaled = [adapter.rescales for adapter, _ in used]
        # computes with the engine's
        built: LoraSet = await on_engine(lambda: combine(parts, key, rescaled, owner))
        return built

    def _release_set(self, key: _SetKey, active: _ActiveSet) -> None:
        active.users -= 1
        if active.users:
            return
        del self._active[key]
        building = active.building
        building.cancel()
        if building.done() and not building.cancelled() and building.exception() is None:
            self._batched_lora.forget(building.result())

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _copy_to_device(self, adapter: Adapter) -> Adapter:
        """The adapter on the device, copied on a stream of its own so that no step waits for it."""
        if self._device.type == "cpu":
            return adapter
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            on_device = upload(adapter, self._device)
        if self._stream is not None:
            self._stream.synchronize()
            for one in on_device.factors.values():
                self._share_with_engine(*one.tensors)
        return on_device

    def _share_with_engine(self, *tensors: Tensor) -> None:
        """The engine's stream reads them: no reuse of their memory before it has."""
        for tensor in tensors:
            tensor.record_stream(engine_stream(self._device))


def _read_checked(file: bytes, digest: str, pipeline: Any, names: LayerNames) -> Adapter:
    check_digest(file, digest)
    with torch.inference_mode():
        return read_lora(file, pipeline, names)


def _lower_priority_of_this_thread() -> None:
    """On Linux every thread has a priority of its own."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
