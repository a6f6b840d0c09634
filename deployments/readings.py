"""The numbers of a model's replica, read from its parts for `telemetry`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.telemetry import Reading

if TYPE_CHECKING:
    import torch

    from deployments.engine.worker import Worker
    from deployments.loaded import LoadedModel

STATM = Path("/proc/self/statm")  # Linux: pages, the second number resident


def of_worker(worker: Worker) -> Iterator[Reading]:
    """What the engine does and did."""
    (running, waiting), tally = worker.load, worker.tally
    yield Reading("weft_requests_running", running)
    yield Reading("weft_requests_waiting", waiting)
    yield Reading("weft_slots", worker.slots)
    yield Reading("weft_requests", tally.requests)
    yield Reading("weft_requests_handed_back", tally.handed_back)
    yield Reading("weft_steps", tally.steps)
    yield Reading("weft_batches_halved", tally.halved)
    for kind, number in tally.failures.copy().items():
        yield Reading("weft_requests_failed", number, {"kind": kind})
    for what, (number, seconds) in tally.forwards.items():
        labels = {"model": what.model, "module": what.module, "size": what.size, "rows": str(what.rows)}
        yield Reading("weft_forwards", number, labels)
        yield Reading("weft_forward_seconds", seconds, labels)


def of_models(models: Iterable[LoadedModel]) -> Iterator[Reading]:
    """What the loaded models hold, and how their caches do."""
    for loaded in models:
        model = {"model": loaded.card.id}
        prompts, bank = loaded.prompts, loaded.adapters
        uses, held = bank.uses, bank.held
        yield Reading("weft_model_bytes", loaded.size_bytes, model)
        yield Reading("weft_prompts_cached", prompts.hits, model)
        yield Reading("weft_prompts_encoded", prompts.misses, model)
        yield Reading("weft_prompt_cache_bytes", prompts.bytes, model)
        yield Reading("weft_adapter_uses", uses.on_device, {**model, "level": "device"})
        yield Reading("weft_adapter_uses", uses.in_memory, {**model, "level": "memory"})
        yield Reading("weft_adapter_uses", uses.from_files, {**model, "level": "file"})
        yield Reading("weft_adapters_evicted", uses.evicted, model)
        yield Reading("weft_adapters_held", held.on_device, {**model, "level": "device"})
        yield Reading("weft_adapters_held", held.in_memory, {**model, "level": "memory"})
        on_device = held.device_bytes + held.stacked_bytes
        yield Reading("weft_adapter_bytes", on_device, {**model, "level": "device"})
        yield Reading("weft_adapter_bytes", held.memory_bytes, {**model, "level": "memory"})


def of_memory(device: torch.device) -> Iterator[Reading]:
    """What this process and its device have."""
    if STATM.exists():
        pages = int(STATM.read_text().split()[1])
        yield Reading("weft_host_bytes", pages * os.sysconf("SC_PAGE_SIZE"))
    if device.type != "cuda":
        return
    import torch

    free, total = torch.cuda.mem_get_info(device)
    yield Reading("weft_device_bytes", torch.cuda.memory_allocated(device), {"what": "allocated"})
    yield Reading("weft_device_bytes", torch.cuda.memory_reserved(device), {"what": "reserved"})
    yield Reading("weft_device_bytes", total - free, {"what": "used"})
    yield Reading("weft_device_bytes", total, {"what": "total"})
