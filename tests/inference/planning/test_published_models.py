"""Cards of published models against the models' configurations, their pipelines, and plans for every GPU."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import diffusers
import pytest
from torch import nn

from deployments.planning.gpus import GPUS
from deployments.planning.part_plan import DENOISERS, block_sizes
from deployments.planning.plan import plan_of
from deployments.protocol.card import ModelCard
from deployments.protocol.memory_needs import PartNeeds
from tests.inference import editing
from tests.inference.families_table import PAGE
from tests.inference.planning.denoiser_inputs import pixels_per_latent
from tests.inference.planning.measured_needs import part_needs
from tests.inference.planning.published_cards import CARDS
from tests.inference.planning.published_models import CONFIGURATIONS, MODELS, PIPELINES, Part, built

PUBLISHED = [card.id for card in CARDS.values() if card.weights.repo and not card.weights.gguf]
SAME_CONFIGURATION = {
    "dreamshaper-8": "stable-diffusion-v1.5",
    "realistic-vision-v6": "stable-diffusion-v1.5",
}
# tiny ones of editing.py, which are no rows of the page of families; FLUX.2 [dev] has the transformer and the
# loop of FLUX.2 [klein], which is one
OTHER_TINY = {"QwenImageEditPlusPipeline", "QwenImageEditPipeline", "Flux2Pipeline"}


def parts_of(card_id: str) -> dict[str, Part]:
    return dict(MODELS[SAME_CONFIGURATION.get(card_id, card_id)])


def pipeline_of(card_id: str) -> Any:
    return getattr(diffusers, PIPELINES[SAME_CONFIGURATION.get(card_id, card_id)])


UNCHECKED = "safety_checker"  # of Stable Diffusion 1.5: published_models.py has no configuration of it

_BUILT: dict[int, nn.Module] = {}  # by the part's configuration, which several models share


def module_of(part: Part) -> nn.Module:
    if id(part[1]) not in _BUILT:
        _BUILT[id(part[1])] = built(*part)
    return _BUILT[id(part[1])]


@cache
def counted(card_id: str, name: str) -> PartNeeds:
    return PartNeeds.model_validate(part_needs(name, module_of(parts_of(card_id)[name])))


def test_thirty_published_models_have_cards() -> None:
    assert len({CARDS[card_id].weights.repo for card_id in PUBLISHED}) >= 30
    assert {card_id for card_id in PUBLISHED if card_id not in SAME_CONFIGURATION} == set(MODELS)


def test_every_configuration_names_its_source_and_is_used() -> None:
    used = {name for parts in CONFIGURATIONS["models"].values() for name in parts.values() if "/" not in name}

    assert used == set(CONFIGURATIONS["parts"])
    assert all(len(part["source"]) > 10 for part in CONFIGURATIONS["parts"].values())


@pytest.mark.parametrize("card_id", PUBLISHED)
def test_memory_of_a_card_is_that_of_the_published_configurations(card_id: str) -> None:
    memory = CARDS[card_id].memory
    assert memory is not None
    stated = dict(memory.parts) | ({} if memory.controlnet is None else {"controlnet": memory.controlnet})

    assert set(stated) - {UNCHECKED} == set(parts_of(card_id))
    for name, needs in stated.items():
        if name == UNCHECKED:
            continue
        found = counted(card_id, name)
        assert needs.parameters == pytest.approx(found.parameters, rel=0.001), name
        if name not in ("vae", "controlnet", "image_encoder"):
            assert needs.linear == pytest.approx(found.linear, abs=0.002), name
        if name in DENOISERS and name != "unet":  # in the order in which they are streamed
            assert block_sizes(needs) == pytest.approx(block_sizes(found), rel=0.03), name


@pytest.mark.parametrize("card_id", PUBLISHED)
def test_sizes_of_a_card_are_those_that_its_latents_can_have(card_id: str) -> None:
    card, parts = CARDS[card_id], parts_of(card_id)
    denoiser = next(parts[name] for name in DENOISERS if name in parts)
    frames, side = pixels_per_latent(module_of(parts["vae"]))
    config: Any = module_of(denoiser).config  # type: ignore[arg-type]
    vae: Any = module_of(parts["vae"]).config
    channels = vae.get("z_dim") or vae["latent_channels"]
    patch = config.get("patch_size") or 1
    patch = patch[-1] if isinstance(patch, tuple | list) else patch
    if "LTX" not in denoiser[0].__name__ and config["in_channels"] >= 4 * channels:
        patch = 2  # four latents are packed into a token

    assert card.sizes.multiple % (side * patch) == 0
    if card.videos is not None:
        assert card.videos.every == frames


@pytest.mark.parametrize("card_id", PUBLISHED)
def test_a_card_agrees_with_its_pipeline(card_id: str) -> None:
    card, pipeline = CARDS[card_id], pipeline_of(card_id)
    parameters = inspect.signature(pipeline.__call__).parameters

    if "max_sequence_length" in parameters and card_id != "flux.1-schnell":
        assert card.max_sequence_length == parameters["max_sequence_length"].default
    assert not card.negative_prompt or "negative_prompt" in parameters
    parts, _ = pipeline._get_signature_keys(pipeline)
    assert set(parts_of(card_id)) - {"controlnet"} <= set(parts)
    tiny = {name for row in PAGE.read_text(encoding="utf-8").split("\n| ")[1:] for name in named(row)}
    assert pipeline.__name__ in tiny | OTHER_TINY


def named(row: str) -> list[str]:
    cells = row.split(" | ")
    return cells[1].split(", ") if len(cells) > 1 else []


def test_the_editing_models_have_tiny_pipelines() -> None:
    assert type(editing.qwen_edit_plus()).__name__ in OTHER_TINY


@pytest.mark.parametrize("card_id", PUBLISHED)
def test_every_gpu_has_a_plan_or_a_refusal_with_bytes(card_id: str) -> None:
    card = CARDS[card_id]
    for gpu in GPUS.values():
        machine = gpu.machine()
        plan = plan_of(card, machine)
        if plan.refusal is not None:
            assert plan.refusal.message.count("GiB") >= 2
        elif machine.limit_bytes is not None:
            assert plan.planned is not None
            assert plan.planned.peak <= machine.limit_bytes


@pytest.mark.parametrize("card_id", PUBLISHED)
def test_a_card_states_what_the_licence_is(card_id: str) -> None:
    card: ModelCard = CARDS[card_id]

    assert card.licence.name
    assert card.licence.url.startswith("https://huggingface.co/")
    if "Non-Commercial" in card.licence.name:
        assert not card.licence.commercial
    if card.licence.name in ("Apache-2.0", "MIT"):
        assert card.licence.commercial
