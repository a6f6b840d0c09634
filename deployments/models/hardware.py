"""The device that this process may use, and what it says of its memory."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Collection, Hashable, Iterable
from weakref import ReferenceType

import psutil
import torch
from torch import nn

from deployments.models.activations import Lane
from deployments.models.device_memory import DeviceMemory
from deployments.planning.device_limit import CONTEXT_BYTES, own_share, usable_bytes
from deployments.planning.machine import Machine

logger = logging.getLogger(__name__)

LEAVING_PAUSES_S = (0.05, 0.2, 0.5, 1.0, 2.0)  # for modules that something still refers to


def best_device() -> torch.device:
    """CUDA (or ROCm, which torch calls cuda too), else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def machine_of(device: torch.device, limit_bytes: int | None) -> Machine:
    """What a plan depends on. limit_bytes: what this process may allocate on the device; None: no limit."""
    host = psutil.virtual_memory().total
    if device.type == "mps":
        metal = torch.mps.recommended_max_memory()
        limit = metal if limit_bytes is None else min(metal, limit_bytes)
        return Machine("Apple GPU", "mps", limit, host_bytes=host)
    if device.type != "cuda":
        return Machine("CPU", "cpu", limit_bytes, host_bytes=host)
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        architecture = torch.cuda.get_device_properties(device).gcnArchName
        return Machine(name, "rocm", limit_bytes, host_bytes=host, architecture=architecture)
    return Machine(name, "cuda", limit_bytes, torch.cuda.get_device_capability(device), host)


def limit_to_share(device: torch.device, gpu_share: float) -> None:
    """Have torch allocate no more of a GPU than this process's part of it, so that a neighbour keeps its own.

    gpu_share: `num_gpus` of the replica. No effect for a whole GPU and for other devices.
    """
    share = own_share(gpu_share)
    if device.type != "cuda" or share == 1:
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(max(0.0, share - CONTEXT_BYTES / total), device)
    logger.info("limited to a part of the GPU", extra={"share": share, "bytes": int(share * total)})


def memory_bytes(device: torch.device, gpu_share: float, *, alone: bool = False) -> int | None:
    """Bytes of a GPU that this process may allocate now, next to the other processes on it. None elsewhere.

    gpu_share: `num_gpus` of the replica. alone: as if there were no other processes.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    there = total if alone else free + torch.cuda.memory_reserved(device)
    return usable_bytes(total, there, gpu_share)


def free_unused_memory(modules: Collection[ReferenceType[nn.Module]] = ()) -> None:
    """Return to the device what modules had that nothing uses any more; some and their hooks refer to each
    other.

    modules: those that are given up. The thread of a request that has just ended may still refer to them for
    a moment; what is given their memory before that would not find it.
    """
    gc.collect()
    for pause_s in LEAVING_PAUSES_S:
        if all(module() is None for module in modules):
            break
        time.sleep(pause_s)
        gc.collect()
    else:
        names = sorted({type(left).__name__ for module in modules if (left := module()) is not None})
        if names:
            logger.warning("unloaded modules are still in memory", extra={"modules": names})
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def wait_for_kernels(device: torch.device) -> None:
    """Wait until no stream of a GPU computes any more with what is going to be freed: its memory may be given
    to a tensor of another stream at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def references_to(modules: Iterable[nn.Module]) -> list[ReferenceType[nn.Module]]:
    """By which is seen whether they are gone."""
    return [ReferenceType(module) for module in modules]


class PeakMeter:
    """Measures what the forwards of both lanes allocate on a GPU (an engine.memory_meter.MemoryMeter)."""

    def __init__(self, device: torch.device, memory: DeviceMemory) -> None:
        self._device = device
        self._memory = memory
        self._lock = threading.Lock()  # the lanes have a thread each
        self._running = 0  # forwards
        self._started = 0  # forwards so far

    def start(self, key: Hashable, rows: int) -> tuple[int, int] | None:
        """A forward begins: its number (0: another runs) and the bytes allocated before it; None: it need
        not be measured.

        The statistics take some 100 us, so only the first forwards of a batch size are measured.
        """
        with self._lock:
            self._running += 1
            self._started += 1
            if not self._memory.wants_measurement(key, rows):
                return None
            if self._running > 1:  # a reset would lower the peak of the other forward
                return 0, torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return self._started, torch.cuda.memory_allocated(self._device)

    def stop(self, started: tuple[int, int] | None, lane: Lane, key: Hashable, rows: int) -> None:
        """The forward has been computed or queued, with so many rows; 0: it failed."""
        with self._lock:
            self._running -= 1
            if started is None or not rows:
                return
            peak = torch.cuda.max_memory_allocated(self._device)
            number, before = started
            alone = number == self._started
        self._memory.record_forward(lane, key, rows, before=before, peak=peak, alone=alone)
