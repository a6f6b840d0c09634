"""What bringing a weight of a GGUF file into floats takes is at most what plans reckon with."""

from __future__ import annotations

from typing import Any

import gguf
import pytest
import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from torch.profiler import ProfilerActivity, profile

from deployments.gguf_format.header import GgufTensor
from deployments.gguf_format.sizes import layer_workspace
from deployments.gguf_format.tensor_types import QUANTISED

ROWS, COLUMNS = 256, 2048


def peak_bytes(work: Any) -> int:
    """The most memory that is allocated at a time while `work` runs, beyond what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        work()
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("number", QUANTISED, ids=[kind.name for kind in QUANTISED.values()])
def test_a_layer_takes_what_its_plan_counts_and_not_much_less(number: int, dtype: torch.dtype) -> None:
    kind = QUANTISED[number]
    width = COLUMNS // kind.block * kind.block_bytes
    with torch.device("meta"):
        layer: Any = GGUFLinear(COLUMNS, ROWS, bias=False, compute_dtype=dtype)
    layer.weight = GGUFParameter(
        torch.zeros(ROWS, width, dtype=torch.uint8), quant_type=gguf.GGMLQuantizationType(number)
    )
    x = torch.zeros(1, COLUMNS, dtype=dtype)

    with torch.inference_mode():
        layer(x)
        taken = peak_bytes(lambda: layer(x))

    counted = layer_workspace(GgufTensor("a", kind, number, (ROWS, COLUMNS), 0), dtype.itemsize)
    assert 0.99 * counted < taken <= 1.01 * counted
