"""Weights in 8 and 4 bits: what they take, how far results move, and what is refused before any work."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import FluxTransformer2DModel, TorchAoConfig
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig

from deployments.loras.source import read_lora
from deployments.models.compile import repeated_blocks
from deployments.models.load import load_pipeline
from deployments.models.model_memory import LoadBytes, weights_bytes
from deployments.models.quantise import quantisable_layers, quantise
from deployments.pipelines.ensemble import share_equal_parts
from deployments.planning.machine import Machine
from deployments.planning.plan import PartPlan, Plan, plan_of
from deployments.protocol.card import Quantisation, Weights, load_card
from deployments.protocol.errors import ModelFailed
from tests.inference import tiny
from tests.inference.lora_files import file_of, random_lora

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
MACHINE = Machine("CPU", "cpu")
KINDS = [kind for kind in get_args(Quantisation) if kind != "fp8_dynamic"]  # which needs a GPU
every_kind = pytest.mark.parametrize("kind", KINDS)
# in dB, of a picture of tiny-sd15: measured 37.8, 23.0, 26.7 and 17.7
PSNR = {"int8": 34, "fp8": 20, "fp8_cast": 23, "nf4": 15}
# of the output of a Linear layer with random weights: measured 0.0067, 0.026, 0.026 and 0.091
ERRORS = {"int8": 0.01, "fp8": 0.04, "fp8_cast": 0.04, "nf4": 0.12}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def wide_layer(dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(256, 192).to(dtype)


def quantised(module: nn.Module, kind: Quantisation, dtype: Any = "bfloat16") -> Any:
    quantise(module, PartPlan("part", dtype, quantisation=kind))
    return module


def load(name: str, wanted: Any, **options: Any) -> Any:
    """The pipeline of a shipped card with this value of serving.quantisation."""
    card = load_card(ROOT / f"configs/models/{name}.yaml")
    serving = card.serving.model_copy(update={"quantisation": wanted})
    plan = plan_of(card.model_copy(update={"serving": serving}), MACHINE)
    return load_pipeline(card.weights, CPU, plan=plan, **options)


def parts_of(pipeline: Any) -> list[nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


# --- values -----------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_outputs_move_little_and_in_the_dtype_of_the_layer(kind: Quantisation, dtype: Any) -> None:
    net = nn.Sequential(wide_layer(getattr(torch, dtype)))
    x = torch.randn(64, 256).to(net[0].weight.dtype)
    plain = net(x).float()

    output = quantised(net, kind, dtype)(x)

    error = float((output.float() - plain).norm() / plain.norm())
    assert output.dtype is x.dtype
    assert 0 < error < ERRORS[kind]


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_rows_of_zeros_stay_zeros(kind: Quantisation) -> None:
    net = nn.Sequential(wide_layer())
    with torch.no_grad():
        net[0].weight[3] = 0
        net[0].bias[3] = 0

    output = quantised(net, kind)(torch.randn(4, 256, dtype=torch.bfloat16))

    assert output.isfinite().all()
    assert not output[:, 3].any()


def test_large_activations_do_not_overflow_in_float16() -> None:
    net = nn.Sequential(nn.Linear(4096, 16, bias=False).half())
    x = torch.full((16, 4096), 3.0, dtype=torch.float16)
    with torch.no_grad():
        net[0].weight.fill_(0.001)

    output = quantised(net, "int8", "float16")(x)

    assert torch.allclose(output, torch.full_like(output, 4096 * 0.003), rtol=0.01)


@every_kind
def test_a_text_encoder_keeps_the_dtype_of_its_activations(kind: Quantisation) -> None:
    """T5 casts them to the dtype of a layer's weight, as it is asked."""
    encoder = tiny._t5().bfloat16()
    tokens = torch.arange(16)[None]
    plain = encoder(tokens).last_hidden_state.float()

    changed = quantised(encoder, kind)(tokens).last_hidden_state.float()

    assert float((changed - plain).norm() / plain.norm()) < 3 * ERRORS[kind]


def test_layers_that_share_a_weight_stay_as_they_are() -> None:
    net = nn.ModuleDict(
        {"embedding": nn.Embedding(32, 16), "head": nn.Linear(16, 32), "other": nn.Linear(16, 16)}
    )
    net["head"].weight = net["embedding"].weight

    assert [name for _, name, _ in quantisable_layers(net)] == ["other"]


def test_settings_of_torch_for_all_models_do_not_change() -> None:
    before = torch.get_float32_matmul_precision()

    for kind in KINDS:
        quantised(nn.Sequential(wide_layer()), kind)

    assert torch.get_float32_matmul_precision() == before


# --- bytes ------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_tensors_that_hold_the_values() -> None:
    weights, bias = 192 * 256, 192 * 2
    nets = {kind: quantised(nn.Sequential(wide_layer()), kind) for kind in KINDS}

    assert weights_bytes([nets["int8"]]) == weights + 192 * (4 + 1) + bias
    assert weights_bytes([nets["fp8"]]) == weights + 192 * 4 + bias
    assert weights_bytes([nets["nf4"]]) == weights // 2 + weights // 64 * 4 + 16 * 4 + bias
    assert weights_bytes([nets["fp8_cast"]]) == weights + bias // 2


@every_kind
def test_a_model_is_admitted_with_about_the_bytes_that_it_takes(kind: Quantisation) -> None:
    asked: list[LoadBytes] = []

    pipeline = load("tiny-flux-dev", {"transformer": kind, "text_encoder_2": kind}, admit=asked.append)

    held = weights_bytes(parts_of(pipeline))
    assert asked[-1] == LoadBytes(held)
    # fp8_cast leaves modulations, which are a large part of so small a model
    assert asked[0].held == pytest.approx(held, rel=0.4 if kind == "fp8_cast" else 0.05)
    assert held < 0.7 * weights_bytes(parts_of(load("tiny-flux-dev", "none")))


# --- plans, and what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-flux-dev", "tiny-wan", "tiny-sd15"])
def test_one_form_is_that_of_the_denoiser(name: str) -> None:
    pipeline = load(name, "int8")

    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    assert kinds_in(denoiser) >= {"Int8Tensor"}
    assert kinds_in(pipeline.text_encoder) == {"Parameter"}


def test_a_card_may_name_parts() -> None:
    pipeline = load("tiny-sdxl-base", {"text_encoder_2": "nf4", "unet": "none"})

    assert "Params4bit" in kinds_in(pipeline.text_encoder_2)
    assert kinds_in(pipeline.unet) == kinds_in(pipeline.text_encoder) == {"Parameter"}


def test_a_part_that_the_model_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(ModelFailed, match=r"names unet, which the model does not have; it has text_encoder,"):
        load("tiny-flux-dev", {"unet": "int8"}, admit=lambda _bytes: pytest.fail("it is read"))


def test_a_form_that_the_device_does_not_compute_is_refused() -> None:
    with pytest.raises(ModelFailed, match=r"fp8_dynamic weights need a GPU .*: fp8 or int8"):
        load("tiny-flux-dev", "fp8_dynamic", admit=lambda _bytes: pytest.fail("it is read"))


# --- LoRAs and shared parts -------------------------------------------------------------------------------


@every_kind
def test_loras_have_the_dtype_that_layers_compute_in(kind: Quantisation) -> None:
    pipeline = tiny.flux().to(dtype=torch.float32)
    file = file_of(random_lora(pipeline, ["transformer"]))
    before = {layer: (one.a.shape, one.b.shape) for layer, one in read_lora(file, pipeline).factors.items()}

    quantised(pipeline.transformer, kind, "float32")

    after = read_lora(file, pipeline).factors
    assert {layer: (one.a.shape, one.b.shape) for layer, one in after.items()} == before
    assert {one.a.dtype for one in after.values()} == {torch.float32}


@every_kind
def test_a_refiner_shares_equal_parts_of_one_form(kind: Quantisation) -> None:
    base, refiner, other = tiny.sdxl(), tiny.sdxl(), tiny.sdxl()
    for pipeline in (base, refiner):
        quantised(pipeline.text_encoder_2, kind, "float32")

    share_equal_parts(refiner, base)
    share_equal_parts(other, base)

    assert refiner.text_encoder_2 is base.text_encoder_2
    assert other.text_encoder_2 is not base.text_encoder_2


def kinds_in(module: nn.Module) -> set[str]:
    """Classes of the weights of Linear layers."""
    return {type(layer.weight).__name__ for layer in module.modules() if isinstance(layer, nn.Linear)}


def test_quantised_files_are_loaded_as_they_are_and_not_quantised_again(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ROOT / "models/tiny-flux-dev", tmp_path / "model"))
    form = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    stored = FluxTransformer2DModel.from_pretrained(folder / "transformer", quantization_config=form)
    stored.save_pretrained(folder / "transformer")
    weights = Weights(path=str(folder), dtype="float32")
    plan = Plan("float32", (PartPlan("transformer", "float32", quantisation="int8"),))

    with pytest.raises(ModelFailed, match="files of transformer are quantised by torchao; leave"):
        load_pipeline(weights, CPU, plan=plan)
    loaded = load_pipeline(weights, CPU)

    assert kinds_in(loaded.transformer) == {"Int8Tensor"}
    assert list(quantisable_layers(loaded.transformer)) == []


def test_quantised_blocks_are_not_compiled() -> None:
    pipeline = load("tiny-flux-dev", "int8")

    with pytest.raises(ModelFailed, match="quantised weights and cannot be compiled; take compile out"):
        repeated_blocks(pipeline)


def test_pictures_differ_little_from_those_of_full_precision() -> None:
    plain = picture(load("tiny-sd15", "none"))

    ratios = {kind: psnr(picture(load("tiny-sd15", kind)), plain) for kind in KINDS}

    assert all(ratios[kind] > PSNR[kind] for kind in KINDS), ratios
    assert max(ratios.values()) < 100, "the weights really are quantised"


def picture(pipeline: Any) -> torch.Tensor:
    """(H, W, 3), values up to 1."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    size = {"width": 64, "height": 64}
    result = pipeline("a red circle", num_inference_steps=6, generator=generator, output_type="np", **size)
    return torch.from_numpy(result.images[0])


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB."""
    return -10 * math.log10(float(((one - other) ** 2).mean()))
