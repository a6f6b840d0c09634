"""Chapter 5: an edit by reference: the drawing of a red circle and "make it blue"."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from dataclasses import replace

import pytest
from PIL import Image

from deployments.protocol.card import load_card
from deployments.protocol.events import Artifact
from deployments.protocol.request import GenerationRequest
from deployments.replica import ModelReplica
from serve_app.settings import ROOT
from tools.tiny_models.edit_score import shows
from tools.tiny_models.scenes import Scene, Thing, render

CIRCLE = Thing("circle", "red", 0.45, 0.35, 0.5)
BEFORE = Scene(1, "one", "white", (CIRCLE,), mentions_background=False, mentions_colour=True)
EDITS = {
    "make it blue": replace(BEFORE, things=(replace(CIRCLE, colour="blue"),)),
    "make the background yellow": replace(BEFORE, background="yellow"),
    "move it to the right": replace(BEFORE, things=(replace(CIRCLE, x=0.6),)),
}


@pytest.fixture(scope="module")
def editor() -> Iterator[ModelReplica]:
    replica = ModelReplica([load_card(ROOT / "configs/models/tiny-flux-kontext.yaml")])
    yield replica
    replica.__del__()


async def edited(editor: ModelReplica, instruction: str, seed: int) -> Image.Image:
    file = io.BytesIO()
    render(BEFORE).save(file, "PNG")
    request = GenerationRequest(
        model="tiny-flux-kontext",
        prompt=instruction,
        references=(file.getvalue(),),
        seed=seed,
    )
    events = [event async for event in editor.generate(request)]
    made = next(event for event in events if isinstance(event, Artifact))
    return Image.open(io.BytesIO(made.data)).convert("RGB")


async def test_what_the_prompt_names_changes_and_nothing_else(editor: ModelReplica) -> None:
    pictures = await asyncio.gather(
        *(edited(editor, instruction, seed) for seed, instruction in enumerate(EDITS))
    )

    right = [shows(picture, after) for picture, after in zip(pictures, EDITS.values(), strict=True)]
    assert right == [True, True, True]


async def test_edits_of_a_batch_are_those_of_each_alone(editor: ModelReplica) -> None:
    together = await asyncio.gather(
        *(edited(editor, instruction, seed) for seed, instruction in enumerate(EDITS))
    )
    alone = [await edited(editor, instruction, seed) for seed, instruction in enumerate(EDITS)]

    assert [picture.tobytes() for picture in together] == [picture.tobytes() for picture in alone]
