"""What a replica's models hold of its device, with the tiny model that ships and a limit of our own."""

from __future__ import annotations

import io
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from deployments.models.device_memory import GIB
from deployments.models.load import load_pipeline
from deployments.models.model_memory import weights_bytes
from deployments.protocol.card import ModelCard, load_card
from deployments.protocol.errors import OutOfMemory
from deployments.protocol.events import Done, Event, Failed
from deployments.protocol.request import Control, GenerationRequest, Lora
from deployments.replica import ModelReplica
from tests.inference.lora_files import file_of, random_lora

CARDS = Path(__file__).parents[3] / "configs/models"
SD15, SCHNELL = load_card(CARDS / "tiny-sd15.yaml"), load_card(CARDS / "tiny-flux-schnell.yaml")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_pipeline(SD15.weights, torch.device("cpu"))


@pytest.fixture(scope="module")
def weights(pipeline: Any) -> int:
    return weights_bytes([part for part in pipeline.components.values() if isinstance(part, nn.Module)])


@asynccontextmanager
async def replica(
    limit_bytes: float | None, *cards: ModelCard, **serving: Any
) -> AsyncGenerator[ModelReplica]:
    """A replica that may use so much of the device."""
    serving |= {"warm_up": False, "memory_gib": None if limit_bytes is None else limit_bytes / GIB}
    changed = [
        card.model_copy(update={"serving": card.serving.model_copy(update=serving)})
        for card in cards or (SD15,)
    ]
    made = ModelReplica(changed)
    yield made
    made.__del__()


async def last_event(model: ModelReplica, card: ModelCard = SD15, **changes: Any) -> Event:
    request = GenerationRequest(
        model=card.id,
        prompt="a red circle",
        seed=1,
        width=64,
        height=64,
        num_inference_steps=1,
        **changes,
    )
    return [event async for event in model.generate(request)][-1]


async def memory(model: ModelReplica) -> dict[str, Any]:
    status: dict[str, Any] = await model.status()
    return status["memory_bytes"]


def canny() -> Control:
    return Control(type="canny", image=_png())


def _png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


async def test_weights_count_whenever_they_are_loaded(weights: int) -> None:
    async with replica(None) as model:
        before = await memory(model)
        ended = await last_event(model, controls=(canny(),))
        after = await memory(model)

    assert isinstance(ended, Done)
    assert before == {
        "weights": weights,
        "loras": 0,
        "stacks": 0,
        "prompts": 0,
        "requests": 0,
        "working": 0,
        "activations": 0,
        "limit": None,
    }
    assert after["weights"] > weights
    assert after["prompts"] > 0


async def test_a_controlnet_that_does_not_fit_is_refused_and_other_requests_go_on(weights: int) -> None:
    async with replica(weights + 2**20) as model:
        refused = [await last_event(model, controls=(canny(),)) for _ in range(2)]
        other = await last_event(model)
        held = await memory(model)

    assert [event.kind for event in refused if isinstance(event, Failed)] == [OutOfMemory.kind] * 2
    assert "the ControlNet models/tiny-sd15-canny needs" in refused[1].message
    assert isinstance(other, Done)
    assert held["weights"] == weights


async def test_an_idle_lora_gives_way_to_a_controlnet(pipeline: Any, weights: int) -> None:
    def attention(path: str, _layer: nn.Module) -> bool:
        return "attn" in path

    file = file_of(random_lora(pipeline, ["unet"], rank=64, only=attention))
    async with replica(None) as model:
        await last_event(model, loras=(Lora.of(file),), controls=(canny(),))
        both = await memory(model)

    async with replica(both["weights"] + both["loras"] // 2) as model:
        first = await last_event(model, loras=(Lora.of(file),))
        held = await memory(model)
        second = await last_event(model, controls=(canny(),))
        after = await memory(model)

    assert both["loras"] > 0
    assert isinstance(first, Done)
    assert isinstance(second, Done)
    assert (held["loras"], after["loras"]) == (both["loras"], 0)


async def test_models_of_a_group_take_turns_on_a_device_that_holds_one(weights: int) -> None:
    async with replica(1.5 * weights, SD15, SCHNELL) as model:
        ended = [await last_event(model, card) for card in (SD15, SCHNELL, SD15)]
        held = await memory(model)

    assert all(isinstance(event, Done) for event in ended)
    assert held["weights"] == weights


async def test_a_model_that_does_not_fit_fails_its_requests_with_both_sizes(weights: int) -> None:
    """Its replica runs: one that ended would be started again and again, and give no reason."""
    async with replica(weights - 1) as model:
        refused = await last_event(model)

    assert isinstance(refused, Failed)
    assert refused.kind == OutOfMemory.kind
    assert "the model tiny-sd15 needs" in refused.message


async def test_what_quantised_weights_spare_is_not_kept_for_one_picture() -> None:
    """A card states its weights in its dtype with one picture: the difference would count as the picture."""
    picture = 32 * 2**20
    async with replica(None, SCHNELL) as model:
        whole = (await memory(model))["weights"]
    card = SCHNELL.model_copy(update={"vram_gib": (whole + picture) / GIB})
    forms = {"transformer": "int8", "text_encoder_2": "int8"}

    async with replica(None, card) as model:
        plain = await memory(model)
    async with replica(None, card, quantisation=forms) as model:
        quantised = await memory(model)

    assert quantised["weights"] < whole / 2
    assert plain["working"] == pytest.approx(picture, rel=0.01)
    assert quantised["working"] == pytest.approx(picture, rel=0.02)
