"""Model cards as this installation runs them: what the settings MODEL_... change of every card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deployments.planning.part_plan import DENOISERS
from deployments.protocol.card import ModelCard, Serving, Weights, load_cards
from deployments.protocol.errors import BadRequest
from deployments.protocol.family import family_of, is_of_family
from deployments.protocol.invalid_values import wrong_values
from serve_app.settings import ROOT, Settings

INDEX = "model_index.json"  # in the folder of a diffusers pipeline
INDEXES = (INDEX, "modular_model_index.json")  # the second: of a Modular pipeline
XFORMERS = "_native_efficient"  # diffusers' name for torch's memory-efficient attention
UNETS = ("sd", "sdxl")  # families whose attention has no choice in diffusers: torch chooses


def known_cards(settings: Settings) -> dict[str, ModelCard]:
    """Every card of the installation, by id, as the settings have it run. Raises BadRequest."""
    cards = load_cards(settings.cards_dir)
    return as_set(cards, settings, refiners_of(cards))


def refiners_of(cards: Mapping[str, ModelCard]) -> set[str]:
    """Ids of the models that refine pictures of others."""
    return {card.refiner for card in cards.values() if card.refiner is not None}


def as_set(cards: Mapping[str, ModelCard], settings: Settings, refiners: set[str]) -> dict[str, ModelCard]:
    """The cards as the settings have them run. refiners: those that others name. Raises BadRequest."""
    return {name: _as_set(card, settings, is_refiner=name in refiners) for name, card in cards.items()}


def with_base_model(
    cards: Mapping[str, ModelCard],
    known: Mapping[str, ModelCard],
    settings: Settings,
    *,
    one_application: bool,
) -> dict[str, ModelCard]:
    """The served cards, one of which has the weights of MODEL_CHECKPOINT_DIR where that is itself a model.

    It is the one of this name, else the first of the model's family. Raises BadRequest where there is none,
    and where other applications serve models that are not known here.
    """
    folder = settings.model_checkpoint_dir
    if folder is None or not (folder / INDEX).is_file():
        return dict(cards)
    if not one_application:
        raise BadRequest(
            f"MODEL_CHECKPOINT_DIR ({folder}) is itself a model, and several applications serve models; name "
            "a folder that holds one folder per model"
        )
    kind = _pipeline_class(folder / INDEX)
    named = next((card.id for card in _plain_first(known) if folder.name in _names(card)), None)
    if named is not None and named not in cards:
        raise BadRequest(
            f"MODEL_CHECKPOINT_DIR ({folder}) is the model {named}, which is not served; add it to models of "
            "the Serve config"
        )
    fitting = [card.id for card in cards.values() if card.family and is_of_family(card.family, kind)]
    chosen = named or next(iter(fitting), None)
    if chosen is None or chosen not in fitting:
        raise BadRequest(
            f"MODEL_CHECKPOINT_DIR ({folder}) is a {kind}, which {', '.join(cards)} cannot run; serve one "
            "of its family, or name a folder that holds one folder per model"
        )
    return {name: _at(card, folder) if name == chosen else card for name, card in cards.items()}


def card_notices(cards: Mapping[str, ModelCard], settings: Settings) -> Iterator[str]:
    """Sentences on what the settings change of the served cards, and on what they do not.

    cards: as the settings have them run, with their refiners.
    """
    for name, folder in _folders(settings):
        found = {card.id: card.weights.path for card in cards.values() if _lies_in(card.weights, folder)}
        yield from (f"the weights of {model} are those in {path} ({name})" for model, path in found.items())
        if not found:
            yield f"warning: {name} has no effect: {folder} holds none of {', '.join(cards)}"
    device = settings.model_device
    if device is not None and device.startswith("cuda"):
        on_cpu = [card.id for card in cards.values() if not card.serving.num_gpus]
        if on_cpu:
            yield (
                f"warning: MODEL_DEVICE has no effect on {', '.join(on_cpu)}: serving.num_gpus is 0, so they "
                "run on the CPU"
            )
    if settings.precision_quantisation is not None:
        files = [card.id for card in cards.values() if _from_gguf(card)]
        if files:
            yield (
                f"warning: MODEL_PRECISION has no effect on the weights of {', '.join(files)}, which "
                "come from GGUF files"
            )
    if settings.enable_xformers:
        there = [card.id for card in cards.values() if card.serving.attention == XFORMERS]
        where = f"used for {', '.join(there)}" if there else "used for no model here"
        yield (
            "ENABLE_XFORMERS: xformers itself is not used; torch's memory-efficient attention, for which it "
            f"stands, is {where}. Cards that name another keep it, UNets and CPUs have what torch chooses"
        )


def _as_set(card: ModelCard, settings: Settings, *, is_refiner: bool) -> ModelCard:
    base, refiner = settings.model_checkpoint_dir, settings.model_refiner_checkpoint_dir
    if is_refiner and refiner is not None:
        card = _at(card, refiner) if (refiner / INDEX).is_file() else _found(card, refiner)
    elif base is not None and not (base / INDEX).is_file():
        card = _found(card, base)
    card = _with_family(_with_precision(card, settings))
    changes = _serving_changes(card, settings)
    if not changes:
        return card
    try:
        serving = Serving.model_validate({**card.serving.model_dump(), **changes})
    except ValidationError as error:
        fault = wrong_values(error, Serving.model_fields)
        raise BadRequest(f"a setting MODEL_... does not fit the card {card.id}: {fault}") from None
    return card.model_copy(update={"serving": serving})


def _with_precision(card: ModelCard, settings: Settings) -> ModelCard:
    """The card whose weights, and those of its ControlNets, have the dtype of MODEL_PRECISION."""
    dtype = settings.precision_dtype
    if dtype is None:
        return card
    nets = {
        kind: net.model_copy(update={"weights": net.weights.model_copy(update={"dtype": dtype})})
        for kind, net in card.controls.items()
    }
    weights = card.weights.model_copy(update={"dtype": dtype})
    return card.model_copy(update={"weights": weights, "controls": nets})


def _with_family(card: ModelCard) -> ModelCard:
    """The card with the family of its pipeline's class, if it names none and its folder is here."""
    path = card.weights.path
    if card.family is not None or path is None:
        return card
    index = next(
        (file for name in INDEXES if (file := ROOT / Path(path).expanduser() / name).is_file()), None
    )
    return card if index is None else card.model_copy(update={"family": family_of(_pipeline_class(index))})


def _serving_changes(card: ModelCard, settings: Settings) -> dict[str, Any]:
    """What the settings change of a card's `serving`."""
    serving, changes = card.serving, dict[str, Any]()
    if settings.model_max_batch_size is not None:
        changes["max_rows"] = settings.model_max_batch_size
    if settings.precision_quantisation is not None and not _from_gguf(card):
        changes["quantisation"] = settings.precision_quantisation
    if settings.model_device in ("cpu", "mps"):  # Ray counts neither as a GPU
        changes |= {"num_gpus": 0, "accelerator_type": None}
    elif settings.enable_xformers and serving.attention in (None, XFORMERS):
        has_choice = serving.num_gpus and card.family not in UNETS
        changes["attention"] = XFORMERS if has_choice else None
    return changes


def _plain_first(cards: Mapping[str, ModelCard]) -> list[ModelCard]:
    """Those without GGUF files first: a model's name on the hub means these."""
    return sorted(cards.values(), key=lambda card: bool(card.weights.gguf))


def _from_gguf(card: ModelCard) -> bool:
    """Whether the denoiser's weights have the form of a GGUF file, and no other."""
    return not card.weights.gguf.keys().isdisjoint(DENOISERS)


def _found(card: ModelCard, folder: Path) -> ModelCard:
    """The card with its weights in this folder, if they are there; a folder that this machine does not see
    may be on other nodes, and have them under the card's id."""
    if not folder.is_dir():
        return _at(card, folder / card.id)
    places = (folder / name for name in _names(card))
    there = next((place for place in places if (place / INDEX).is_file()), None)
    return card if there is None else _at(card, there)


def _names(card: ModelCard) -> Iterator[str]:
    """Under which a folder of models may have this one: its id, its name on the hub, aliases."""
    repo = card.weights.repo
    yield card.id
    if repo is not None:
        yield from (repo, repo.rpartition("/")[2])
    yield from card.aliases


def _at(card: ModelCard, folder: Path) -> ModelCard:
    """The card with its weights in this folder, which may lack the files of the variant that the hub has."""
    variant = card.weights.variant
    if not any(folder.glob(f"*/*.{variant}[.-]*")):
        variant = None
    weights = Weights(path=str(folder), variant=variant, dtype=card.weights.dtype, gguf=card.weights.gguf)
    return card.model_copy(update={"weights": weights})


def _pipeline_class(index: Path) -> str:
    try:
        return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, LookupError, TypeError):
        raise BadRequest(f"{index} cannot be read; fetch the model again") from None


def _folders(settings: Settings) -> Iterator[tuple[str, Path]]:
    if settings.model_checkpoint_dir is not None:
        yield "MODEL_CHECKPOINT_DIR", settings.model_checkpoint_dir
    if settings.model_refiner_checkpoint_dir is not None:
        yield "MODEL_REFINER_CHECKPOINT_DIR", settings.model_refiner_checkpoint_dir


def _lies_in(weights: Weights, folder: Path) -> bool:
    return weights.path is not None and Path(weights.path).is_relative_to(folder)
