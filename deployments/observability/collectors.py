"""Current values of a replica's metrics, collected from the engine, the models, the process and the GPU."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from deployments.engine.proof_state import ProofState
from deployments.engine.worker import Worker
from deployments.models.device_memory import DeviceMemory
from deployments.models.model_instance import ModelInstance
from deployments.observability.metrics import Sample

STATM = Path("/proc/self/statm")  # on Linux; its second number counts resident pages


def worker_samples(worker: Worker) -> Iterator[Sample]:
    """Load and totals of the engine."""
    (running, waiting), stats = worker.load, worker.stats
    yield Sample("weft_requests_running", running)
    yield Sample("weft_requests_waiting", waiting)
    yield Sample("weft_slots", worker.slots)
    yield Sample("weft_requests_total", stats.requests)
    yield Sample("weft_requests_handed_back_total", stats.preempted)
    yield Sample("weft_steps_total", stats.steps)
    yield Sample("weft_batches_halved_total", stats.halved_batches)
    yield Sample("weft_device_failures_total", stats.device_failures)
    yield Sample("weft_forwards_unproven_total", stats.unproven_forwards)
    for (module, state), number in _count_sizes(worker.proofs()).items():
        yield Sample("weft_batch_sizes", number, {"module": module, "state": state})
    for kind, number in stats.failures.copy().items():
        yield Sample("weft_requests_failed_total", number, {"kind": kind})
    for forward, (number, seconds) in stats.forwards.items():
        labels = {
            "model": forward.model,
            "module": forward.module,
            "size": forward.size,
            "rows": str(forward.batch_size),
        }
        yield Sample("weft_forwards_total", number, labels)
        yield Sample("weft_forward_seconds_total", seconds, labels)


def _count_sizes(proofs: Iterable[ProofState]) -> dict[tuple[str, str], int]:
    """Batch sizes by module and state, over all shapes."""
    counted: dict[tuple[str, str], int] = {}
    for proof in proofs:
        by_state = {"proven": proof.proven, "refused": proof.refused, "pending": proof.pending}
        for state, sizes in by_state.items():
            key = proof.module, state
            counted[key] = counted.get(key, 0) + len(sizes)
    return counted


def model_samples(models: Iterable[ModelInstance]) -> Iterator[Sample]:
    """Size of the loaded models and use of their caches."""
    for instance in models:
        model = {"model": instance.card.id}
        prompts, stats, usage = instance.prompts, instance.loras.stats, instance.loras.usage
        yield Sample("weft_model_bytes", instance.size_bytes, model)
        yield Sample("weft_prompt_cache_hits_total", prompts.hits, model)
        yield Sample("weft_prompt_cache_misses_total", prompts.misses, model)
        yield Sample("weft_prompt_cache_bytes", prompts.bytes, model)
        yield Sample("weft_adapter_uses_total", stats.on_device, {**model, "level": "device"})
        yield Sample("weft_adapter_uses_total", stats.in_memory, {**model, "level": "memory"})
        yield Sample("weft_adapter_uses_total", stats.from_files, {**model, "level": "file"})
        yield Sample("weft_adapters_evicted_total", stats.evicted, model)
        yield Sample("weft_adapters_held", usage.on_device, {**model, "level": "device"})
        yield Sample("weft_adapters_held", usage.in_memory, {**model, "level": "memory"})
        on_device = usage.device_bytes + usage.stacked_bytes
        yield Sample("weft_adapter_bytes", on_device, {**model, "level": "device"})
        yield Sample("weft_adapter_bytes", usage.memory_bytes, {**model, "level": "memory"})


def memory_samples(device: torch.device) -> Iterator[Sample]:
    """Memory of this process and of its GPU; nothing of the GPU on a CPU."""
    if STATM.exists():
        pages = int(STATM.read_text().split()[1])
        yield Sample("weft_host_bytes", pages * os.sysconf("SC_PAGE_SIZE"))
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    yield Sample("weft_device_bytes", torch.cuda.memory_allocated(device), {"what": "allocated"})
    yield Sample("weft_device_bytes", torch.cuda.memory_reserved(device), {"what": "reserved"})
    yield Sample("weft_device_bytes", total - free, {"what": "used"})
    yield Sample("weft_device_bytes", total, {"what": "total"})


def account_samples(memory: DeviceMemory) -> Iterator[Sample]:
    """The account by which models, LoRAs and batches are admitted to the device."""
    for part, size in memory.held.items():
        yield Sample("weft_memory_bytes", size, {"part": part})
    yield Sample("weft_memory_bytes", memory.working_bytes, {"part": "working"})
    yield Sample("weft_memory_bytes", memory.activation_bytes, {"part": "activations"})
    if memory.limit_bytes is not None:
        yield Sample("weft_memory_limit_bytes", memory.limit_bytes)
