"""The promise of test_exactness.py for denoisers whose weights are quantised, with LoRAs beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, PerRow, PerTensor, quantize_

from deployments.engine.bit_trials import BitTrials
from deployments.models.quantise import quantise
from deployments.planning.plan import DENOISERS, PartPlan
from deployments.protocol.card import Quantisation
from deployments.protocol.request import Exactness, Task
from tests.inference.engine.exactness import Bench
from tests.inference.engine.family_schedules import family_schedules
from tests.inference.engine.test_exactness import compare, controlled_bench, flux_bench, sdxl_bench

# the products of fp8_dynamic need a GPU
KINDS = [kind for kind in get_args(Quantisation) if kind != "fp8_dynamic"]
CASES = [
    *(("FLUX.1-dev", kind, exact) for kind in KINDS for exact in ("strict", "prefer")),
    *(("Wan", kind, "prefer") for kind in KINDS),
    ("SDXL", "int8", "strict"),
    ("SDXL", "fp8_cast", "prefer"),
]


@pytest.fixture(autouse=True)
def _inference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Otherwise the machine's load decides whether lone rows run as two: see test_exactness.py."""
    monkeypatch.setattr(BitTrials, "seconds", lambda _trials, _batch_size: 1.0)
    with torch.inference_mode():
        yield


@pytest.mark.filterwarnings("default")  # of the libraries, about unusually small sizes
@pytest.mark.parametrize(("family", "kind", "exact"), CASES)
def test_with_quantised_weights_not_a_bit_differs(family: str, kind: Quantisation, exact: Exactness) -> None:
    def in_its_form(denoiser: nn.Module) -> None:
        before = [parameter.clone() for parameter in denoiser.parameters()]
        quantise(denoiser, PartPlan("denoiser", "float32", quantisation=kind))
        assert any(
            type(a) is not type(b) or a.dtype != b.dtype
            for a, b in zip(before, denoiser.parameters(), strict=True)
        )

    bench = family_schedules(family, exact, in_its_form)

    compared = compare(bench, 2, None)

    assert compared > 2
    # a convolution may have other bits in every batch: then a strict schedule shares nothing of the denoiser
    assert bench.rows > (1.0 if family == "SDXL" and exact == "strict" else 1.1) * bench.forwards


# --- the tests above must catch this ----------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("granularity", "proven"), [(PerRow(), True), (PerTensor(), False)])
def test_scales_of_a_whole_batch_would_be_caught(granularity: Any, proven: bool) -> None:
    """Inputs in 8 bits: with a scale for each row, rows share forwards; with one for all, none is proven."""
    config = Int8DynamicActivationInt8WeightConfig(granularity=granularity, set_inductor_config=False)
    bench = family_schedules("FLUX.1-dev", "strict", lambda denoiser: quantize_(denoiser, config))

    compared = compare(bench, 2, None)

    states = [state for engine in bench.engines.values() for state in engine.proofs()]
    denoiser = [state for state in states if state.module == "FluxTransformer2DModel.forward"]
    assert compared > 2
    assert any(state.proven for state in denoiser) is proven
    assert any(state.refused for state in denoiser) is not proven


# --- start images, masks and control pictures ---------------------------------------------------------------


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("make", "kind", "exact"),
    [
        (flux_bench, "int8", "strict"),
        (sdxl_bench, "fp8", "prefer"),
        (controlled_bench, "fp8_cast", "prefer"),
    ],
)
def test_edits_and_control_pictures_keep_their_bits_too(
    make: Any, kind: Quantisation, exact: Exactness
) -> None:
    bench: Bench = make(torch.float32, exact=exact, decode=True)
    denoisers = [part for name, part in bench.model._pipeline.components.items() if name in DENOISERS]
    for module in (*denoisers, *bench.model._beside.values()):
        quantise(module, PartPlan("part", "float32", quantisation=kind))
    plain = [request for request in bench.requests if request.edit is None and not request.controls]
    edits = [request for request in bench.requests if request not in plain]
    bench.requests = [
        request.model_copy(update={"num_inference_steps": min(3, request.num_inference_steps)})
        for request in (*edits, *plain[:3])
    ]
    met = {request.task for request in bench.requests}
    nets = {len(request.controls) for request in bench.requests}

    compared = compare(bench, 2, None)

    assert met == {Task.t2i, Task.i2i, Task.inpaint}
    assert nets == ({0, 1, 2} if make is controlled_bench else {0})
    assert compared > 2
    assert bench.rows > bench.forwards
