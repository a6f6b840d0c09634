"""Every form of weights in every place, in batches of requests with and without LoRAs: not a bit differs from
the requests alone with the same weights on the device. What a device or a part cannot do is refused by the
plan, or before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from deployments.engine.batch_buckets import pad_small_linears
from deployments.engine.bit_trials import BitTrials
from deployments.engine.intercept import intercept
from deployments.models import load as loading
from deployments.models import offload as offloading
from deployments.models import parts as part_files
from deployments.models.load import load_pipeline
from deployments.models.model_extras import _weights_of
from deployments.models.offload import offload, offloaded_part
from deployments.models.quantise import quantise
from deployments.planning.machine import Machine
from deployments.planning.plan import PartPlan, Placement, Plan, plan_of
from deployments.protocol.card import Quantisation, load_card
from deployments.protocol.errors import ModelFailed
from tests.inference.engine.family_schedules import FamilySchedules, family_schedules

CPU = torch.device("cpu")
CARDS = Path(__file__).parents[3] / "configs/models"
KINDS = [kind for kind in get_args(Quantisation) if kind != "fp8_dynamic"]  # which needs a GPU
PLACES: tuple[tuple[Placement, Placement], ...] = (  # of the denoiser, of the text encoders
    ("device", "on_demand"),
    ("streamed", "on_demand"),
    ("streamed", "streamed"),
    ("sequential", "sequential"),
)
FAMILY = "FLUX.1-dev"


@pytest.fixture(autouse=True)
def _inference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(offloading, "SMALL_BYTES", 0)
    monkeypatch.setattr(BitTrials, "seconds", lambda _trials, _batch_size: 1.0)
    with torch.inference_mode():
        yield


def schedules(kind: Quantisation) -> FamilySchedules:
    """With the denoiser and the large text encoder in this form, on the device."""
    made = family_schedules(
        FAMILY, "strict", lambda denoiser: quantise(denoiser, PartPlan("", "float32", quantisation=kind))
    )
    quantise(made.pipeline.text_encoder_2, PartPlan("text_encoder_2", "float32", quantisation=kind))
    return made


@pytest.fixture(scope="module", params=KINDS)
def on_device(request: pytest.FixtureRequest) -> tuple[Quantisation, FamilySchedules]:
    with torch.inference_mode():
        return request.param, schedules(request.param)


@pytest.mark.filterwarnings("default")  # of the libraries, about unusually small sizes
@pytest.mark.parametrize("places", PLACES)
def test_every_form_computes_the_same_bits_in_every_place(
    on_device: tuple[Quantisation, FamilySchedules], places: tuple[Placement, Placement]
) -> None:
    kind, plain = on_device
    moving = schedules(kind)
    moved = {"transformer": places[0], "text_encoder": places[1], "text_encoder_2": places[1]}
    for name, placement in moved.items():
        if placement != "device":
            part = getattr(moving.pipeline, name)
            offload(part, PartPlan(name, "float32", placement, resident_blocks=1), CPU)
            assert offloaded_part(part) is not None
    intercept(moving.modules, weights_of=_weights_of)
    pad_small_linears(moving.modules)
    moving.intercepted = True
    chosen = [0, 1, *(i for i, request in enumerate(plain.requests) if request.lora_set)][:5]

    fibers = moving.together([moving.requests[index] for index in chosen])

    assert any(plain.requests[index].lora_set for index in chosen)
    for index, fiber in zip(chosen, fibers, strict=True):
        assert fiber.failure is None, fiber.failure
        assert fiber.result.same_bits(plain.expected(plain.requests[index])), index


# --- what cannot be is refused before any weight is read ----------------------------------------------------

GPU = Machine("NVIDIA A10G", "cuda", 22 * 2**30, (8, 6), 64 * 2**30)
CPU_MACHINE = Machine("CPU", "cpu")


@pytest.mark.parametrize(
    ("machine", "serving", "message"),
    [
        (
            GPU,
            {"compile": True, "quantisation": "int8"},
            "compile: true, and int8 weights of the transformer",
        ),
        (GPU, {"compile": True, "quantisation": {"transformer": "nf4"}}, "take compile out, or leave the"),
        (CPU_MACHINE, {"compile": True, "quantisation": "fp8"}, "compile: true, and fp8 weights of the"),
        (CPU_MACHINE, {"quantisation": "fp8_dynamic"}, "it does not multiply 8-bit floats; write fp8, int8"),
        (Machine("Apple GPU", "mps", 2**34), {"quantisation": "nf4"}, "nf4 does not run on it; write int8"),
    ],
)
def test_forms_that_do_not_go_together_are_refused_by_the_plan(
    machine: Machine, serving: dict[str, Any], message: str
) -> None:
    card = load_card(CARDS / "flux.1-dev.yaml")
    card = card.model_copy(update={"serving": card.serving.model_copy(update=serving)})

    refusal = plan_of(card, machine).refusal

    assert refusal is not None
    assert refusal.kind == "card"
    assert message in refusal.message


@pytest.mark.parametrize(("offload", "place"), [("balanced", "streamed"), ("sequential", "sequential")])
def test_weights_that_move_are_not_compiled(offload: str, place: str) -> None:
    card = load_card(CARDS / "tiny-flux-dev.yaml")  # states no memory: it is placed as it says
    serving = card.serving.model_copy(update={"offload": offload, "compile": True})

    refusal = plan_of(card.model_copy(update={"serving": serving}), GPU).refusal

    assert refusal is not None
    assert f"compile: true, and weights of the transformer that are {place}" in refusal.message


def test_a_plan_for_compiled_code_leaves_the_denoiser_as_it_is() -> None:
    card = load_card(CARDS / "flux.1-dev.yaml")
    serving = card.serving.model_copy(update={"compile": True})
    card = card.model_copy(update={"serving": serving})

    made = plan_of(card, Machine("GPU", "cuda", 30 * 2**30, (8, 9), 64 * 2**30))
    small = plan_of(card, GPU)

    assert made.refusal is None
    assert made.part("transformer").quantisation is None
    assert made.part("text_encoder_2").quantisation == "fp8"
    assert small.refusal is not None
    assert "take compile out of its card (then int8 weights" in small.refusal.message


def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(part: part_files.PartFiles, _device: torch.device) -> nn.Module:
        raise AssertionError(f"{part.folder} was read")

    monkeypatch.setattr(part_files.PartFiles, "load", read)


def test_a_vae_without_tiles_is_refused_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    no_reading(monkeypatch)

    class Whole(loading.torch.nn.Module):  # type: ignore[name-defined,misc]
        @staticmethod
        def load_config(_folder: Path) -> dict[str, Any]:
            return {}

        @classmethod
        def from_config(cls, _config: dict[str, Any]) -> nn.Module:
            return cls()

    find_parts = loading.find_parts

    def found(*arguments: Any) -> dict[str, part_files.PartFiles]:
        parts = find_parts(*arguments)
        vae = parts["vae"]
        return parts | {"vae": part_files.PartFiles(Whole, vae.folder, vae.files, vae.plan)}

    monkeypatch.setattr(loading, "find_parts", found)
    weights = load_card(CARDS / "tiny-sd15.yaml").weights

    with pytest.raises(ModelFailed, match="Whole cannot do vae_tiling; take it out of the card"):
        load_pipeline(weights, CPU, plan=Plan("float32", vae_tiling=True))


def test_a_denoiser_that_cannot_be_compiled_is_refused_before_weights_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_reading(monkeypatch)
    weights = load_card(CARDS / "tiny-flux-dev.yaml").weights

    with monkeypatch.context() as patched:
        patched.setattr("diffusers.FluxTransformer2DModel._repeated_blocks", [])
        with pytest.raises(ModelFailed, match="diffusers does not name its repeated blocks"):
            load_pipeline(weights, CPU, compiled=True)
    with monkeypatch.context() as patched:
        patched.setattr(part_files.PartFiles, "stored_form", "torchao")
        with pytest.raises(ModelFailed, match="transformer has quantised weights and cannot be compiled"):
            load_pipeline(weights, CPU, compiled=True)
