"""A new model is one card: pipelines that no code names are served by the replica."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.protocol.card import Guidance, Licence, ModelCard, Serving, Sizes, Steps, Weights
from deployments.protocol.events import Artifact, Done, Event, Failed, Step
from deployments.protocol.request import GenerationRequest
from deployments.replica import ModelReplica
from tests.inference.families import FAMILIES
from tests.inference.more_families import MORE

LICENCE = Licence(name="Apache 2.0", url="https://www.apache.org/licenses/LICENSE-2.0", commercial=True)
# of the table of families, with the tasks of their cards
PIPELINES = {
    "Stable Diffusion 3": ["t2i", "i2i"],
    "Qwen-Image": ["t2i", "i2i"],
    "Z-Image": ["t2i", "i2i"],
    "AuraFlow": ["t2i"],
    "Lumina 2": ["t2i"],
    "Ovis-Image": ["t2i"],
    "CogView 4": ["t2i"],
    "CogView 3 Plus": ["t2i"],
    "Chroma": ["t2i", "i2i"],
    "Lumina Next": ["t2i"],
}
EVERY = FAMILIES | MORE


def card_of(name: str, folder: Path) -> ModelCard:
    """A card with what every card must say, and no family."""
    return ModelCard(
        id="any",
        name=name,
        weights=Weights(path=str(folder), dtype="float32"),
        tasks=PIPELINES[name],
        steps=Steps(min=1, default=2, max=4),
        guidance=Guidance(min=0.0, default=3.0, max=10.0),
        sizes=Sizes(width=32, height=32, min=32, max=64),
        max_sequence_length=16,
        licence=LICENCE,
        serving=Serving(exact="off"),
    )


@pytest.mark.filterwarnings("default")  # of the libraries, about unusually small sizes
@pytest.mark.parametrize("name", PIPELINES)
async def test_a_pipeline_that_no_code_names_is_served_from_its_card(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    EVERY[name].build().to(dtype=torch.float32).save_pretrained(tmp_path)
    card = card_of(name, tmp_path)
    model = ModelReplica([card])

    try:
        events = await events_of(model, prompt="a cat", seed=1)
    finally:
        model.__del__()

    assert not [event for event in events if isinstance(event, Failed)]
    assert isinstance(events[-1], Done)
    assert [event.step for event in events if isinstance(event, Step)] == [1, 2]
    assert [event.kind for event in events if isinstance(event, Artifact)]


async def events_of(model: ModelReplica, **arguments: Any) -> list[Event]:
    return [event async for event in model.generate(GenerationRequest(model="any", **arguments))]
