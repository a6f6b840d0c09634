"""What a plan says of how parts compute (tiles, slices, memory format, attention) has its effect, and a batch
has the bits of its requests alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from deployments.models import attention, load
from deployments.models.attention import BACKENDS, check_attention
from deployments.models.load import load_pipeline
from deployments.models.vae import TILE_PIXELS, set_pieces
from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.pipelines.latent_decoder import output_type
from deployments.planning.machine import Machine
from deployments.planning.plan import Plan, plan_of
from deployments.protocol.card import load_card
from deployments.protocol.errors import ModelFailed
from deployments.protocol.request import ResolvedEdit, ResolvedRequest, Task
from tests.inference.engine.exactness import Answer, Bench

CPU = torch.device("cpu")
CARDS = Path(__file__).parents[3] / "configs/models"


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def plan_with(name: str, **serving: Any) -> Plan:
    card = load_card(CARDS / f"{name}.yaml")
    card = card.model_copy(
        update={
            "serving": card.serving.model_copy(update=serving),
            "weights": card.weights.model_copy(update={"dtype": "float32"}),
        }
    )
    return plan_of(card, Machine("CPU", "cpu"))


def pipeline_with(name: str, plan: Plan) -> Any:
    weights = load_card(CARDS / f"{name}.yaml").weights.model_copy(update={"dtype": "float32"})
    return load_pipeline(weights, CPU, plan=plan)


def bench(pipeline: Any, size: int = 64) -> Bench:
    requests = [
        ResolvedRequest(
            model="tiny",
            prompt=("a red circle", "two stars")[seed % 2],
            width=size,
            height=size,
            num_inference_steps=2 + seed % 2,
            guidance_scale=3.0,
            seed=seed,
            max_sequence_length=32,
            edit=ResolvedEdit(image=b"", strength=1.0) if seed == 2 else None,
        )
        for seed in range(4)
    ]
    model = DiffusersModel(pipeline, (Task.t2i, Task.i2i))
    return Bench(requests, exact="strict", model=model, decode=True)


def answers_together(bench: Bench) -> list[Answer]:
    """Of all requests in one batch, after each is found to have the bits that it has alone."""
    fibers = bench.together(bench.requests)
    for request, fiber in zip(bench.requests, fibers, strict=True):
        assert fiber.failure is None, fiber.failure
        assert fiber.result.same_bits(bench.expected(request))
    return [fiber.result for fiber in fibers]


def difference(one: Answer, other: Answer) -> float:
    pairs = zip(one.pictures, other.pictures, strict=True)
    return max(float(abs(a.astype(int) - b.astype(int)).mean()) for a, b in pairs)


@pytest.mark.parametrize("name", ["tiny-flux-dev", "tiny-sd15"])
def test_tiled_pictures_are_those_alone_and_nearly_those_in_one_piece(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.models.vae.TILE_PIXELS", 36)
    pipeline = pipeline_with(name, plan_with(name, vae_tiling=True, vae_slicing=True))
    vae = pipeline.vae
    sides: list[int] = []
    vae.decoder.register_forward_pre_hook(lambda _module, inputs: sides.append(inputs[0].shape[-1]))

    tiled = answers_together(bench(pipeline, 96))

    assert (vae.use_tiling, vae.use_slicing) == (True, True)
    assert vae.tile_sample_min_size <= 36
    assert max(sides) == vae.tile_latent_min_size, "no larger piece is decoded"
    whole = bench(pipeline_with(name, plan_with(name)), 96)
    for request, answer in zip(whole.requests[:2], tiled, strict=False):
        assert torch.equal(answer.latents, whole.expected(request).latents)
        assert 0 < difference(answer, whole.expected(request)) < 12


def test_tiles_are_small_enough_to_save_memory() -> None:
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=1024,
    )

    set_pieces(vae, tiling=True, slicing=False)

    assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (TILE_PIXELS, TILE_PIXELS // 2)
    assert not vae.use_slicing


def test_a_vae_without_tiles_is_an_error() -> None:
    with pytest.raises(ModelFailed, match="Linear cannot do vae_tiling; take it out of the card"):
        set_pieces(nn.Linear(1, 1), tiling=True, slicing=False)


@pytest.mark.parametrize(("tiled", "kind"), [(False, "latent"), (True, "pt")])
def test_a_tiled_video_is_decoded_by_its_pipeline(tiled: bool, kind: str) -> None:
    pipeline = pipeline_with("tiny-wan", plan_with("tiny-wan", vae_tiling=tiled, vae_slicing=True))

    assert output_type(pipeline) == kind


def test_channels_last_changes_the_layout_of_unet_and_vae_only() -> None:
    pipeline = pipeline_with("tiny-sd15", plan_with("tiny-sd15", channels_last=True))

    for part in (pipeline.unet, pipeline.vae):
        kernels = [weight for weight in part.parameters() if weight.ndim == 4 and weight.shape[-1] > 1]
        assert kernels
        assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    plain = bench(pipeline_with("tiny-sd15", plan_with("tiny-sd15")))
    for request, answer in zip(plain.requests, answers_together(bench(pipeline)), strict=True):
        assert answer.distance(plain.expected(request)) < 1e-4


@pytest.mark.parametrize("name", ["_native_math", "_native_flash", "native"])
def test_attention_is_computed_by_the_backend_of_the_card(name: str) -> None:
    pipeline = pipeline_with("tiny-flux-dev", plan_with("tiny-flux-dev", attention=name))

    chosen = {getattr(part.processor, "_attention_backend", None) for part in attention_of(pipeline)}
    assert {backend.value for backend in chosen if backend is not None} == {name}
    plain = bench(pipeline_with("tiny-flux-dev", plan_with("tiny-flux-dev")))
    assert {part.processor._attention_backend for part in attention_of(plain.model._pipeline)} == {None}, (
        "other models keep theirs"
    )
    for request, answer in zip(plain.requests, answers_together(bench(pipeline)), strict=True):
        assert answer.distance(plain.expected(request)) < 1e-4


def attention_of(pipeline: Any) -> list[Any]:
    return [part for part in pipeline.transformer.modules() if hasattr(part, "processor")]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("flash2", "it is not one of diffusers' backends"),
        ("flash_hub", "it is not one of diffusers' backends"),
        ("xformers", "install `xformers"),
        ("_native_cudnn", "No viable backend"),
    ],
)
def test_a_backend_that_does_not_work_is_refused_before_weights_are_read(
    name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_arguments: Any) -> Any:
        raise AssertionError("weights are read")

    monkeypatch.setattr(load, "find_parts", read)

    message = rf"attention '{name}' does not work here: .*{reason}.*write one of .*native"
    with pytest.raises(ModelFailed, match=message):
        pipeline_with("tiny-flux-dev", plan_with("tiny-flux-dev", attention=name))


def test_every_backend_that_is_offered_works(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelFailed) as refused:
        check_attention("nothing", CPU, torch.float32)

    offered = str(refused.value).split("write one of ", 1)[1].split(" in the card")[0].split(", ")
    assert set(offered) < set(BACKENDS)
    for name in offered:
        check_attention(name, CPU, torch.float32)


def test_a_model_without_a_choice_of_attention_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(attention.logger, "warning", lambda message, **_extra: warnings.append(message))

    pipeline_with("tiny-sd15", plan_with("tiny-sd15", attention="native"))

    assert warnings == ["this module has no choice of attention: torch chooses"]
