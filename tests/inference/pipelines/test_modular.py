"""Modular pipelines: mixed requests share forwards in the engine, and a card is all that a new one needs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import Tensor

from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.intercept import intercept
from deployments.pipelines.arguments import parameters_of
from deployments.pipelines.modular import ModularAdapter, adapt
from deployments.protocol.card import Guidance, Licence, ModelCard, Serving, Sizes, Steps, Weights
from deployments.protocol.events import Artifact, Done, Event, Step
from deployments.protocol.request import GenerationRequest
from deployments.replica import ModelReplica
from tests.inference import families
from tests.inference.engine.together import Together

SHORT = {"max_sequence_length": 16}
LAYERS = (0, 1, 2)


class ChatProcessor:
    """What FLUX.3 reads of its processor: a chat template and a tokenizer."""

    def __init__(self) -> None:
        self.tokenizer = families._tokenizer()

    def apply_chat_template(self, messages: list[dict[str, str]], **_options: Any) -> str:
        return messages[0]["content"]


def flux3() -> ModularAdapter:
    """FLUX.3 klein in small: step-distilled, without guidance."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3VLConfig(
        text_config={**families._LANGUAGE, "rope_parameters": rope},
        vision_config={**vision, "deepstack_visual_indexes": [0]},
    )
    pipeline = diffusers.Flux3DistilledModularPipeline()
    pipeline.update_components(
        text_encoder=transformers.Qwen3VLForConditionalGeneration(config).eval(),
        tokenizer=ChatProcessor(),
        vae=families.flux2_klein().vae,
        transformer=diffusers.Flux3Transformer2DModel(
            in_channels=16,
            cond_in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=96,
            timestep_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            flow_map=True,
        ),
    )
    return quiet(pipeline)


def z_image() -> ModularAdapter:
    return quiet(modular_z_image())


def modular_z_image() -> Any:
    parts = families.z_image().components
    pipeline = diffusers.ZImageModularPipeline()
    pipeline.update_components(**{name: parts[name] for name in pipeline.component_names if name in parts})
    return pipeline


def quiet(pipeline: Any) -> ModularAdapter:
    adapted = adapt(pipeline)
    adapted.set_progress_bar_config(disable=True)
    return adapted


def flux3_requests() -> list[dict[str, Any]]:
    common = {"text_encoder_out_layers": LAYERS, "max_sequence_length": 16, "height": 32, "width": 32}
    plain = [{**common, "prompt": families.PROMPTS[i % 3], "num_inference_steps": 2 + i} for i in range(3)]
    pictures = [families.PICTURE.resize((32, 32)), families.PICTURE.rotate(90).resize((32, 32))]
    return [*plain, *({**plain[i], "image": [pictures[i]]} for i in range(2))]


def z_image_requests() -> list[dict[str, Any]]:
    common = {"max_sequence_length": 16, "height": 32, "width": 32}
    return [
        {**common, "prompt": families.PROMPTS[i], "num_inference_steps": 2 + i, "guidance_scale": scale}
        for i, scale in enumerate((3.0, 5.0, 7.0))
    ]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("build", "requests", "most"),
    [(flux3, flux3_requests, 0.8), (z_image, z_image_requests, 0.7)],
    ids=["FLUX.3 klein", "Z-Image"],
)
def test_mixed_requests_share_forwards_and_equal_each_alone(
    build: Callable[[], ModularAdapter], requests: Callable[[], list[dict[str, Any]]], most: float
) -> None:
    pipeline = build()
    works = [work(pipeline, request, seed) for seed, request in enumerate(requests())]

    with torch.inference_mode():
        alone = [call() for call in works]
        together, forwards, calls = play(pipeline, works)

    assert forwards <= most * calls
    for one, other in zip(alone, together, strict=True):
        assert (one - other).abs().max() < 1e-5 * one.abs().max()
    assert not torch.equal(alone[0], alone[1])


def work(pipeline: ModularAdapter, request: dict[str, Any], seed: int) -> Callable[[], Tensor]:
    def call() -> Tensor:
        own: Any = copy.copy(pipeline)
        vars(own)["scheduler"] = copy.deepcopy(pipeline.scheduler)
        made = own(**request, generator=[torch.Generator().manual_seed(seed)], output_type="pt")
        shown = made.images if hasattr(made, "images") else made.frames
        return shown if isinstance(shown, Tensor) else torch.stack(list(shown))

    return call


def play(pipeline: ModularAdapter, works: list[Callable[[], Tensor]]) -> tuple[list[Tensor], int, int]:
    """The results, and forwards and calls of the denoiser."""
    engine = Engine(Together(8))
    restore = intercept([part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)])
    fibers = [Fiber(call) for call in works]
    forwards = calls = 0
    try:
        for fiber in fibers:
            engine.start(fiber)
        while not engine.idle:
            names = {f: f.call.seam.name for f in fibers if f.call is not None}
            moved = engine.step()
            if moved and "Transformer" in names[moved[0]]:
                forwards, calls = forwards + 1, calls + len(moved)
    finally:
        restore()
    for fiber in fibers:
        if fiber.failure is not None:
            raise fiber.failure
    return [fiber.result for fiber in fibers], forwards, calls


def test_the_class_of_a_modular_pipeline_has_the_parameters_of_its_blocks() -> None:
    known = parameters_of(type(z_image()))

    assert {"prompt", "negative_prompt", "image", "height", "num_inference_steps", "generator"} <= known
    assert "guidance_scale" in known  # of its guider
    assert "guidance_scale" not in parameters_of(type(flux3()))


@pytest.mark.filterwarnings("default")
async def test_a_modular_pipeline_is_served_from_its_card(tmp_path: Path) -> None:
    torch.manual_seed(0)
    modular_z_image().save_pretrained(str(tmp_path))
    card = ModelCard(
        id="modular",
        name="Z-Image, modular",
        weights=Weights(path=str(tmp_path), dtype="float32"),
        tasks=["t2i"],
        steps=Steps(min=1, default=2, max=4),
        guidance=Guidance(min=0.0, default=3.0, max=10.0),
        sizes=Sizes(width=32, height=32, min=32, max=64),
        max_sequence_length=16,
        licence=Licence(name="Apache 2.0", url="https://www.apache.org/licenses/LICENSE-2.0"),
        serving=Serving(exact="off"),
    )
    model = ModelReplica([card])

    try:
        events = await events_of(model)
    finally:
        model.__del__()

    assert isinstance(events[-1], Done), events
    assert [event.step for event in events if isinstance(event, Step)] == [1, 2]
    assert [event.kind for event in events if isinstance(event, Artifact)] == ["image", "thumbnail"]


async def events_of(model: ModelReplica) -> list[Event]:
    request = GenerationRequest(model="modular", prompt="a cat", seed=1)
    return [event async for event in model.generate(request)]
