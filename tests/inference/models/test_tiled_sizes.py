"""Large requests are decoded in tiles where the default size is not: by their size alone, in any batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deployments.models.load import load_pipeline
from deployments.models.vae import tiled_beside
from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.planning.device_limit import GIB
from deployments.planning.gpus import GPUS
from deployments.planning.machine import Machine
from deployments.planning.plan import Plan, plan_of
from deployments.protocol.card import load_card
from deployments.protocol.events import Artifact, Failed
from deployments.protocol.request import GenerationRequest, ResolvedEdit, ResolvedRequest, Task
from deployments.replica import ModelReplica
from tests.inference.engine.exactness import Bench
from tests.inference.planning.published_cards import card_of

CPU = torch.device("cpu")
CARDS = Path(__file__).parents[3] / "configs/models"
WHOLE = 64 * 64  # pixels


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.models.vae.TILE_PIXELS", 36)


def bench(name: str, plan: Plan) -> Bench:
    """Requests of two sizes, one of which has a start image; loaded as ModelInstance does."""
    pipeline = load_pipeline(
        load_card(CARDS / f"{name}.yaml").weights.model_copy(update={"dtype": "float32"}), CPU, plan=plan
    )
    model = DiffusersModel(
        pipeline, (Task.t2i, Task.i2i), tiled_vae=tiled_beside(pipeline, plan), tiles=plan.tiles
    )
    requests = [
        ResolvedRequest(
            model="tiny",
            prompt="a red circle",
            width=size,
            height=size,
            num_inference_steps=2,
            guidance_scale=3.0,
            seed=seed,
            max_sequence_length=32,
            edit=ResolvedEdit(image=b"", strength=1.0) if seed == 3 else None,
        )
        for seed, size in enumerate((64, 96, 64, 96))
    ]
    return Bench(requests, exact="strict", model=model, decode=True)


@pytest.mark.parametrize("name", ["tiny-flux-dev", "tiny-sd15"])
def test_large_pictures_of_a_batch_are_tiled_and_small_ones_whole(name: str) -> None:
    plan = replace(Plan("float32"), whole_pixels=WHOLE)
    with torch.inference_mode():
        both, whole = bench(name, plan), bench(name, Plan("float32"))
        tiled = bench(name, replace(plan, whole_pixels=None, vae_tiling=True))
        fibers = both.together(both.requests)

        for request, fiber in zip(both.requests, fibers, strict=True):
            assert fiber.failure is None, fiber.failure
            same, other = (tiled, whole) if request.width > 64 else (whole, tiled)
            assert fiber.result.same_bits(same.expected(request))
            if request.width > 64:
                assert not fiber.result.same_bits(other.expected(request))
    assert not both.model._pipeline.vae.use_tiling, "the VAE that others use stays as it is"


def test_a_tiled_vae_shares_its_weights() -> None:
    pipeline = load_pipeline(load_card(CARDS / "tiny-sd15.yaml").weights, CPU)

    tiled: Any = tiled_beside(pipeline, replace(Plan("float32"), whole_pixels=1))

    assert isinstance(tiled, nn.Module)
    assert (tiled.use_tiling, pipeline.vae.use_tiling) == (True, False)
    assert {id(weight) for weight in tiled.parameters()} == {id(w) for w in pipeline.vae.parameters()}
    assert tiled_beside(pipeline, Plan("float32")) is None


async def test_files_say_that_they_were_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    card = load_card(CARDS / "tiny-flux-schnell.yaml")
    card = card.model_copy(update={"serving": card.serving.model_copy(update={"warm_up": False})})
    plan = replace(plan_of(card, Machine("CPU", "cpu")), whole_pixels=240 * 256)
    with monkeypatch.context() as patched:
        patched.setattr("deployments.models.model_instance.plan_of", lambda *_arguments: plan)
        replica = ModelReplica([card])
    found = {}
    try:
        for width in (240, 256):
            request = GenerationRequest(model=card.id, prompt="a cat", width=width, height=256)
            async for event in replica.generate(request):
                assert not isinstance(event, Failed), event
                if isinstance(event, Artifact) and event.kind == "image":
                    found[width] = event.metadata.get("vae_tiling")
    finally:
        replica.__del__()

    assert found == {240: None, 256: True}


# --- the plan -----------------------------------------------------------------------------------------------


def test_a_plan_says_from_which_size_on_it_tiles() -> None:
    card = card_of("sdxl-base-1.0")  # 1024x1024, at most 2 megapixels

    plans = [plan_of(card, Machine("GPU", "cuda", int(gib * GIB), (8, 9))) for gib in (10, 12, 40)]

    assert [plan.vae_tiling for plan in plans] == [False, False, False]
    small, middle, large = (plan.whole_pixels for plan in plans)
    assert small is not None
    assert middle is None or small < middle
    assert large is None, "the largest picture of the card fits in one piece"
    assert 1024 * 1024 <= small < card.sizes.max_pixels
    assert any("million pixels are decoded in tiles" in note for note in plans[0].notes)
    assert plans[0].tiles(small + 1)
    assert not plans[0].tiles(small)


@pytest.mark.parametrize("gpu", [name for name, gpu in GPUS.items() if gpu.total_gib is not None])
@pytest.mark.parametrize("name", ["flux.1-dev", "sdxl-base-1.0", "wan-2.1-t2v-1.3b", "ltx-video"])
def test_what_is_decoded_whole_fits_beside_one_step(name: str, gpu: str) -> None:
    card, machine = card_of(name), GPUS[gpu].machine()
    plan = plan_of(card, machine)
    if plan.refusal is not None or plan.vae_tiling:
        return
    assert plan.planned is not None
    assert plan.working_bytes is not None
    assert machine.limit_bytes is not None

    makes_videos = card.videos is not None and not card.videos.framewise
    frames = card.videos.num_frames if makes_videos and card.videos is not None else 1
    default = card.sizes.width * card.sizes.height * frames

    held = plan.planned.weights + plan.planned.prompts
    if plan.whole_pixels is not None:
        assert held + plan.working_bytes * plan.whole_pixels / default <= machine.limit_bytes
        assert default <= plan.whole_pixels
