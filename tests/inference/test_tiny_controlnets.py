"""The shipped ControlNets, judged by the pixels of plain pipelines, and through their card."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image

from deployments.protocol.card import load_card
from deployments.protocol.events import Artifact
from deployments.protocol.request import Control, GenerationRequest
from deployments.replica import ModelReplica
from serve_app.settings import ROOT
from tools.tiny_models.controlnet import MAPS, ControlKind
from tools.tiny_models.scenes import Scene, Thing, render
from tools.tiny_models.score import find_objects
from tools.tiny_models.unet_score import control_cases, controlled, load, overlap

MODELS = ROOT / "models"
FOLLOWS: dict[ControlKind, float] = {"canny": 0.8, "depth": 0.8, "pose": 0.55}  # overlap with the true object
BY_CHANCE = 0.5
CASES = 6


@pytest.fixture(scope="module")
def sd15() -> Any:
    return load(MODELS / "tiny-sd15")


@pytest.fixture(scope="module")
def replica() -> Iterator[ModelReplica]:
    replica = ModelReplica([load_card(ROOT / "configs/models/tiny-sd15.yaml")])
    yield replica
    replica.__del__()


@pytest.mark.parametrize("kind", MAPS)
def test_a_controlnet_puts_the_object_where_the_map_has_it(sd15: Any, kind: ControlKind) -> None:
    controlnet = ControlNetModel.from_pretrained(MODELS / f"tiny-sd15-{kind}", torch_dtype=torch.float32)
    pipeline = StableDiffusionControlNetPipeline(
        **sd15.components, controlnet=controlnet, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    cases = control_cases(CASES, kind)

    followed, ignored = (
        np.mean([overlap(picture, case[1].things[0]) for picture, case in zip(pictures, cases, strict=True)])
        for pictures in (
            controlled(pipeline, cases),
            controlled(pipeline, cases, controlnet_conditioning_scale=0.0),
        )
    )

    assert followed > FOLLOWS[kind]
    assert ignored < BY_CHANCE


@pytest.mark.parametrize(
    ("kind", "is_map"), [("canny", False), ("canny", True), ("depth", True), ("pose", True)]
)
async def test_the_service_follows_a_map_through_the_card(
    replica: ModelReplica, kind: ControlKind, is_map: bool
) -> None:
    scene = Scene(1, "one", "white", (Thing("heart", "red", 0.5, 0.3, 0.35),), False, True)
    given = Image.fromarray(MAPS[kind](scene)) if is_map else render(scene)
    file = io.BytesIO()
    given.save(file, "PNG")
    request = GenerationRequest(
        model="tiny-sd15",
        prompt=f"a red {'heart' if kind == 'pose' else 'shape'} on a white background",
        seed=3,
        controls=(Control(image=file.getvalue(), type=kind, is_map=is_map),),
    )

    events = [event async for event in replica.generate(request)]

    made = next(event for event in events if isinstance(event, Artifact))
    _, found = find_objects(Image.open(io.BytesIO(made.data)))
    largest = max(found, key=lambda seen: seen.side)
    assert abs(largest.x - 0.3) < 0.1
    assert abs(largest.y - 0.35) < 0.1
