"""Small programs on the simulated device, right ones and wrong ones, for test_simulated_device.py.

python -m tests.device_sim.small_programs prints what the device counted for each, as JSON.
"""

from __future__ import annotations

import gc
import json
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from deployments.models.quantise import quantise
from deployments.planning.plan import PartPlan
from tests.device_sim import patches
from tests.device_sim.costs import KINDS
from tests.device_sim.device import SimulatedDevice

MIB = 2**20
cuda: Any = torch.cuda


def reads_before_another_stream_has_written() -> None:
    x = torch.zeros(8, device="cuda")
    with cuda.stream(cuda.Stream()):
        x + 1


def reads_after_waiting_for_the_other_stream() -> None:
    x, stream = torch.zeros(8, device="cuda"), cuda.Stream()
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        x + 1
    cuda.current_stream().wait_stream(stream)


def writes_while_another_stream_reads() -> None:
    x, stream = torch.zeros(8, device="cuda"), cuda.Stream()
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        x + 1
    x.zero_()


def frees_what_another_stream_uses() -> None:
    x, stream = torch.zeros(8, device="cuda"), cuda.Stream()
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        x + 1
    del x


def frees_with_the_stream_recorded() -> None:
    x, stream = torch.zeros(8, device="cuda"), cuda.Stream()
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        x + 1
    x.record_stream(stream)
    del x


def writes_pinned_memory_during_a_copy() -> None:
    buffer = torch.zeros(8).pin_memory()
    buffer.to("cuda", non_blocking=True)
    buffer.fill_(1)


def writes_pinned_memory_after_the_copy() -> None:
    buffer, copied = torch.zeros(8).pin_memory(), cuda.Event()
    buffer.to("cuda", non_blocking=True)
    copied.record()
    copied.synchronize()
    buffer.fill_(1)


def reads_pinned_memory_during_a_copy() -> float:
    buffer = torch.empty(8, pin_memory=True)
    buffer.copy_(torch.ones(8, device="cuda"), non_blocking=True)
    return float(buffer.sum())


def uploads_from_pinned_memory() -> None:
    buffer = torch.empty(2**20, pin_memory=True)
    buffer[:1000].to("cuda", non_blocking=True)
    torch.empty(2**20, device="cuda").copy_(buffer, non_blocking=True)


def uploads_from_pageable_memory() -> None:
    torch.zeros(8).to("cuda")
    torch.tensor([1, 2], device="cuda")
    torch.zeros(2**20).to("cuda", non_blocking=True)


def reads_values_back() -> list[Any]:
    ids = torch.arange(5, device="cuda")
    mask = ids > 2
    return [ids.tolist(), int(ids[3]), ids[mask].cpu().tolist(), bool(torch.equal(ids, ids + 0))]


def mixes_devices() -> str:
    try:
        torch.zeros(8, device="cuda") + torch.zeros(8)
    except RuntimeError as error:
        return str(error)
    return ""


def runs_out_of_memory() -> list[Any]:
    free, total = cuda.mem_get_info()
    cuda.set_per_process_memory_fraction(0.25)
    kept = torch.empty(total // 8, dtype=torch.uint8, device="cuda")
    cuda.reset_peak_memory_stats()
    refused = ""
    try:
        torch.empty(total // 4, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError as error:
        refused = str(error)
    more = torch.empty(total // 16, dtype=torch.uint8, device="cuda")
    del more
    allocated, peak = cuda.memory_allocated(), cuda.max_memory_allocated()
    del kept
    return [total, refused, allocated / total, peak / total, cuda.memory_allocated(), free == total]


def multiplies() -> list[Any]:
    x, weight = torch.empty(4, 64, 32, device="cuda"), torch.empty(16, 32, device="cuda")
    functional.linear(x, weight).view(4, -1)[:, 1:]
    query = torch.empty(2, 8, 64, 16, device="cuda")
    functional.scaled_dot_product_attention(query, query, query)
    return [2 * 4 * 64 * 32 * 16, 2 * 2 * 8 * 64 * 64 * (16 + 16)]


def multiplies_by_weights_of_8_bits() -> list[Any]:
    with torch.inference_mode(mode=False):
        layers = nn.Sequential(nn.Linear(512, 512, bias=False, dtype=torch.bfloat16)).requires_grad_(False)
        quantise(layers, PartPlan("transformer", "bfloat16", quantisation="int8"), torch.device("cuda"))
    held = cuda.memory_allocated()
    x = torch.zeros(1, 512, dtype=torch.bfloat16, device="cuda")
    cuda.reset_peak_memory_stats()
    before = cuda.memory_allocated()
    layers(x)
    return [held, cuda.max_memory_allocated() - before]


def measures_time_on_a_stream_with_priority() -> list[Any]:
    least, greatest = cuda.Stream.priority_range()
    stream = cuda.Stream(priority=greatest)
    begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    with cuda.stream(stream):
        begin.record()
        torch.ones(2**28, device="cuda")
        end.record()
    end.synchronize()
    return [stream.priority < least, begin.elapsed_time(end)]


def makes_noise() -> list[Any]:
    generator = torch.Generator("cuda").manual_seed(0)
    noise = torch.randn(3, 4, generator=generator, device="cuda")
    return [str(noise.device), list(noise.shape), isinstance(generator, torch.Generator)]


PROGRAMS: tuple[Callable[[], Any], ...] = (
    reads_before_another_stream_has_written,
    reads_after_waiting_for_the_other_stream,
    writes_while_another_stream_reads,
    frees_what_another_stream_uses,
    frees_with_the_stream_recorded,
    writes_pinned_memory_during_a_copy,
    writes_pinned_memory_after_the_copy,
    reads_pinned_memory_during_a_copy,
    uploads_from_pinned_memory,
    uploads_from_pageable_memory,
    reads_values_back,
    mixes_devices,
    multiplies,
    multiplies_by_weights_of_8_bits,
    measures_time_on_a_stream_with_priority,
    makes_noise,
    runs_out_of_memory,  # last: the limit stays
)


def count(device: SimulatedDevice, program: Callable[[], Any]) -> dict[str, Any]:
    """What the device counted while this program ran, and what the program returned."""
    gc.collect()  # of quantised weights, which refer to themselves
    device.begin_part()
    returned: list[Any] = []

    def run() -> None:
        with torch.inference_mode():
            returned.append(program())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    measurements = device.measurements
    return {
        "returned": returned[0],
        "hazards": list(device.memory.hazards),
        "mixing": sum(measurements.mixing.values()),
        "waits": sum(sync.count for sync in measurements.syncs.values()),
        "kernels": measurements.total.total.kernels,
        "flops": measurements.total.total.flops,
    }


def main() -> None:
    device = SimulatedDevice(KINDS["a10g"])
    patches.install(device)
    print(json.dumps({program.__name__: count(device, program) for program in PROGRAMS}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
