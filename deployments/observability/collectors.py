"""The numbers of a model's replica, read from its parts for `telemetry`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from deployments.engine.worker import Worker
from deployments.models.model_instance import ModelInstance
from deployments.observability.metrics import Sample

STATM = Path("/proc/self/statm")  # Linux: pages, the second number resident


def worker_samples(worker: Worker) -> Iterator[Sample]:
    """What the engine does and did."""
    (running, waiting), stats = worker.load, worker.stats
    yield Sample("weft_requests_running", running)
    yield Sample("weft_requests_waiting", waiting)
    yield Sample("weft_slots", worker.slots)
    yield Sample("weft_requests", stats.requests)
    yield Sample("weft_requests_handed_back", stats.preempted)
    yield Sample("weft_steps", stats.steps)
    yield Sample("weft_batches_halved", stats.halved_batches)
    for kind, number in stats.failures.copy().items():
        yield Sample("weft_requests_failed", number, {"kind": kind})
    for what, (number, seconds) in stats.forwards.items():
        labels = {"model": what.model, "module": what.module, "size": what.size, "rows": str(what.batch_size)}
        yield Sample("weft_forwards", number, labels)
        yield Sample("weft_forward_seconds", seconds, labels)


def model_samples(models: Iterable[ModelInstance]) -> Iterator[Sample]:
    """What the loaded models hold, and how their caches do."""
    for loaded in models:
        model = {"model": loaded.card.id}
        prompts, lora_cache = loaded.prompts, loaded.loras
        uses, held = lora_cache.stats, lora_cache.usage
        yield Sample("weft_model_bytes", loaded.size_bytes, model)
        yield Sample("weft_prompts_cached", prompts.hits, model)
        yield Sample("weft_prompts_encoded", prompts.misses, model)
        yield Sample("weft_prompt_cache_bytes", prompts.bytes, model)
        yield Sample("weft_adapter_uses", uses.on_device, {**model, "level": "device"})
        yield Sample("weft_adapter_uses", uses.in_memory, {**model, "level": "memory"})
        yield Sample("weft_adapter_uses", uses.from_files, {**model, "level": "file"})
        yield Sample("weft_adapters_evicted", uses.evicted, model)
        yield Sample("weft_adapters_held", held.on_device, {**model, "level": "device"})
        yield Sample("weft_adapters_held", held.in_memory, {**model, "level": "memory"})
        on_device = held.device_bytes + held.stacked_bytes
        yield Sample("weft_adapter_bytes", on_device, {**model, "level": "device"})
        yield Sample("weft_adapter_bytes", held.memory_bytes, {**model, "level": "memory"})


def memory_samples(device: torch.device) -> Iterator[Sample]:
    """What this process and its device have."""
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
