"""Makes torch.cuda the simulated device, for the rest of the process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tests.device_sim.clock import (
    DEFAULT_STREAM,
    SimEvent,
    SimStream,
    current_stream,
    host,
    launched,
    set_stream,
    use_stream,
)
from tests.device_sim.device import SimulatedDevice
from tests.device_sim.guard import load_guard


class SimGenerator(torch.Generator):
    """torch.Generator, also for "cuda": what it would generate there has no values."""

    place: torch.device

    def __new__(cls, device: Any = "cpu") -> SimGenerator:
        made: SimGenerator = super().__new__(cls, "cpu")  # type: ignore[call-arg]
        made.place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place


def install(device: SimulatedDevice) -> None:
    """Replace what torch.cuda and Tensor do with a GPU; every thread started from here on has the device."""
    load_guard()
    _patch_streams(device)
    _patch_memory(device)
    _patch_properties(device)
    _patch_tensors(device)
    _patch_modules()
    _enter_in_threads(device)


def _patch_streams(device: SimulatedDevice) -> None:
    def synchronize(_device: Any = None) -> None:
        with device.lock:
            host.merge(launched)  # it waits for all streams
        device.waited("torch.cuda.synchronize")

    cuda: Any = torch.cuda
    SimStream.on_wait = lambda: device.waited("stream.synchronize")
    cuda.Stream, cuda.Event = SimStream, SimEvent
    cuda.stream, cuda.set_stream, cuda.current_stream = use_stream, set_stream, current_stream
    cuda.default_stream = lambda _device=None: DEFAULT_STREAM
    cuda.synchronize = synchronize


def _patch_memory(device: SimulatedDevice) -> None:
    memory = device.memory

    def reset_peak(_device: Any = None) -> None:
        memory.peak_since_reset = memory.live

    def set_fraction(fraction: float, _device: Any = None) -> None:
        memory.limit = min(memory.limit, int(fraction * memory.total))

    cuda: Any = torch.cuda
    cuda.memory_allocated = cuda.memory_reserved = lambda _device=None: memory.live
    cuda.max_memory_allocated = cuda.max_memory_reserved = lambda _device=None: memory.peak_since_reset
    cuda.reset_peak_memory_stats = reset_peak
    cuda.mem_get_info = lambda _device=None: (memory.limit - memory.live, memory.total)
    cuda.set_per_process_memory_fraction = set_fraction
    cuda.empty_cache = lambda: None  # nothing is cached


def _patch_properties(device: SimulatedDevice) -> None:
    kind = device.kind
    properties = SimpleNamespace(
        name=kind.gpu.full_name,
        total_memory=kind.memory_bytes,
        major=kind.capability[0],
        minor=kind.capability[1],
        multi_processor_count=kind.processors,
    )
    cuda: Any = torch.cuda
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.init = cuda._lazy_init = lambda: None
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.set_device = lambda _device: None
    cuda.get_device_properties = lambda _device=None: properties
    cuda.get_device_name = lambda _device=None: properties.name
    cuda.get_device_capability = lambda _device=None: kind.capability
    cuda.is_bf16_supported = lambda *_a, **_k: True
    cuda.manual_seed = cuda.manual_seed_all = lambda _seed: None


def _patch_tensors(device: SimulatedDevice) -> None:
    host_memory = device.host_memory

    def pin_memory(self: Tensor, _device: Any = None) -> Tensor:
        return self if host_memory.is_pinned(self) else host_memory.pin(self.clone())

    def record_stream(self: Tensor, stream: SimStream) -> None:
        with device.lock:
            device.memory.record_stream(self, stream)

    tensor: Any = Tensor
    fake: Any = FakeTensor
    fake.tolist = lambda self: self.cpu().tolist()  # one copy, where fakes read value by value
    tensor.pin_memory, tensor.record_stream = pin_memory, record_stream
    tensor.is_pinned = lambda self, _device=None: host_memory.is_pinned(self)
    torch.Generator = SimGenerator  # type: ignore[misc]


def _patch_modules() -> None:
    """nn.Module.to with new weights in place of the old ones, which it swaps where they are FakeTensors: that
    is not possible with those that something refers to. Modules that share a weight go on sharing it."""

    def apply(self: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        changed: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the weight, which is kept
        for module in self.modules() if recurse else (self,):
            for weights in (module._parameters, module._buffers):
                for name, weight in [(name, one) for name, one in weights.items() if one is not None]:
                    if id(weight) not in changed:
                        new = change(weight)
                        if new is not weight and isinstance(weight, nn.Parameter):
                            new = nn.Parameter(new, requires_grad=False)
                        changed[id(weight)] = weight, new
                    weights[name] = changed[id(weight)][1]
        return self

    module: Any = nn.Module
    module._apply = apply


def _enter_in_threads(device: SimulatedDevice) -> None:
    thread: Any = threading.Thread
    run = thread.run

    def run_on_device(self: threading.Thread) -> None:
        with device.fake, device:
            run(self)

    thread.run = run_on_device
