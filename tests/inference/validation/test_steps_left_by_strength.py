"""The steps that a strength leaves are counted as each pipeline of diffusers counts them."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Iterator

import diffusers
import pytest

from deployments.protocol.card import ModelCard, load_card
from deployments.protocol.errors import BadRequest
from deployments.protocol.family import family_of
from deployments.protocol.request import Edit, GenerationRequest
from deployments.validation.resolve import ROUNDED_DOWN, denoising_steps, resolve
from serve_app.settings import ROOT
from tests.serving.api.editing import png

CARD = load_card(ROOT / "configs/models/stable-diffusion-v1.5.yaml")
DOWN = re.compile(r"int\(num_inference_steps \* strength\)")
UP = re.compile(r"min\(num_inference_steps \* strength, num_inference_steps\)")


def sources() -> Iterator[tuple[str, str]]:
    """Name and source of every class of diffusers' pipelines that is not deprecated."""
    root = diffusers.pipelines
    for module in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
        if ".deprecated" in module.name or ".pipeline_" not in module.name or "_onnx_" in module.name:
            continue
        try:
            members = vars(importlib.import_module(module.name))
        except Exception:  # it needs a library that is not installed
            continue
        for name, member in members.items():
            if inspect.isclass(member) and member.__module__ == module.name:
                yield name, inspect.getsource(member)


def test_the_families_are_those_whose_pipelines_round_down() -> None:
    down, up = set(), set()
    for name, source in sources():
        if DOWN.search(source):
            down.add(family_of(name))
        elif UP.search(source):
            up.add(family_of(name))

    assert len(up) > 5
    assert not down & up
    assert down == ROUNDED_DOWN


def of_family(family: str) -> ModelCard:
    return CARD.model_copy(update={"family": family})


def asked(strength: float) -> GenerationRequest:
    return GenerationRequest(
        model=CARD.id, prompt="a cat", num_inference_steps=10, edit=Edit(image=png(), strength=strength)
    )


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("family", ["kolors", "sd", "qwen_image", "flux", "of my own"])
def test_the_steps_of_a_family(family: str, strength: float) -> None:
    card = of_family(family)
    steps = denoising_steps(resolve(asked(strength), card, fresh_seed=1).request, card)

    rounding = math.floor if family in ("kolors", "sd") else math.ceil
    assert steps == rounding(10 * strength)


def test_a_strength_that_leaves_no_step_is_refused() -> None:
    with pytest.raises(BadRequest, match="leaves no step"):
        resolve(asked(0.05), of_family("kolors"), fresh_seed=1)
    assert resolve(asked(0.05), of_family("qwen_image"), fresh_seed=1)
