"""Pipelines of all families give the bits of weights on the device wherever their weights live, with LoRAs
too. What is on the host is NaN, as in test_offload.py."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deployments.engine.batch_buckets import pad_small_linears
from deployments.engine.intercept import intercept
from deployments.models import offload as offloading
from deployments.models.model_extras import _weights_of
from deployments.models.offload import blocks_of, offload
from deployments.models.packed_weights import PackedWeights
from deployments.planning.plan import PartPlan, Placement
from tests.inference.engine.family_schedules import family_schedules
from tests.inference.families import FAMILIES, Family
from tests.inference.models.test_offload import blank

CPU = torch.device("cpu")
DENOISERS = ("transformer", "transformer_2", "unet", "controlnet")


@pytest.fixture(autouse=True)
def _host_without_values(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(PackedWeights, "use_host", lambda own: own.use([blank(w) for w in own._on_host]))
    monkeypatch.setattr(offloading, "SMALL_BYTES", 0)
    with torch.inference_mode():
        yield


def place(pipeline: Any, denoiser: Placement, encoder: Placement) -> None:
    """Offload the parts, and intercept all."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    for name, part in parts.items():
        placement = denoiser if name in DENOISERS else encoder
        if name.startswith(("text_encoder", *DENOISERS)):
            offload(part, PartPlan(name, "float32", placement, resident_blocks=1), CPU)
    intercept(parts.values(), weights_of=_weights_of)


def answer(pipeline: Any, family: Family, arguments: Any) -> Tensor:
    own = copy.copy(pipeline)
    vars(own)["scheduler"] = copy.deepcopy(pipeline.scheduler)
    own.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    result: Tensor = getattr(own(**arguments, generator=generator, output_type="latent"), family.output)
    return result


@pytest.mark.filterwarnings("default")  # of the libraries, about unusually small sizes
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_the_same_bits_from_the_host(name: str) -> None:
    family = FAMILIES[name]
    torch.manual_seed(0)
    pipeline = family.build()
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    arguments = family.requests()[0]
    expected = answer(pipeline, family, arguments)

    for denoiser, encoder in (("streamed", "on_demand"), ("sequential", "sequential")):
        offloaded = copy.copy(pipeline)
        for part_name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                vars(offloaded)[part_name] = copy.deepcopy(part)
        place(offloaded, denoiser, encoder)  # type: ignore[arg-type]
        first, second = (answer(offloaded, family, arguments) for _ in range(2))
        assert torch.equal(first, expected), (denoiser, "before the order of blocks is known")
        assert torch.equal(second, expected), (denoiser, "after that")


@pytest.mark.filterwarnings("default")  # of the libraries, about unusually small sizes
@pytest.mark.parametrize(("name", "placement"), [("LTX-Video", "streamed"), ("SDXL", "sequential")])
def test_loras_add_the_same_bits_to_weights_that_move(name: str, placement: Placement) -> None:
    plain, moving = family_schedules(name, "strict"), family_schedules(name, "strict")
    place(moving.pipeline, placement, placement)
    moving.intercepted = True
    pad_small_linears(moving.modules)
    with_loras = [index for index, request in enumerate(plain.requests) if request.lora_set][:3]

    fibers = moving.together([moving.requests[index] for index in with_loras])

    assert with_loras
    for index, fiber in zip(with_loras, fibers, strict=True):
        assert fiber.failure is None, fiber.failure
        assert fiber.result.same_bits(plain.expected(plain.requests[index]))


def test_every_denoiser_has_blocks_to_stream() -> None:
    lengths = {}
    for name, family in FAMILIES.items():
        pipeline = family.build()
        denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
        lengths[name] = len(blocks_of(denoiser))

    assert min(lengths.values()) >= 1, lengths
