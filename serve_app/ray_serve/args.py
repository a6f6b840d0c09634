"""What may stand under `args` in a Serve config file, one type per builder of serve_app/app.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from deployments.protocol.card import ModelCard, Serving, Weights, card_without_file
from deployments.protocol.errors import BadRequest, NotFound

GATEWAY = "weft"  # name of the gateway's application, where nothing else is said


class BuilderArgs(BaseModel):
    """An unknown key stops the deployment with its name."""

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, Any] = Field({}, description="Values of serve_app/settings.py; no secrets.")


class UncardedModel(BaseModel):
    """Weights served under a name of their own; only FLUX variants may lack a card (they run as schnell)."""

    model_config = ConfigDict(extra="forbid")

    id: str
    weights: Weights


class ServingOverride(BaseModel):
    """A card of cards_dir, some of whose `serving` is otherwise here."""

    model_config = ConfigDict(extra="forbid")

    id: str
    serving: dict[str, Any] = Field(description="Values of `serving` in place of the card's.")


class EncoderArgs(BaseModel):
    """The deployment that turns frames into video files; there is one when a model makes videos."""

    model_config = ConfigDict(extra="forbid")

    threads: int = Field(2, ge=1, description="Of one video's encoding.")
    num_cpus: float = Field(0, ge=0, description="That a replica claims of Ray. 0: it fits everywhere.")
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(4, ge=1)


def _tag(model: object) -> str:
    """So that a mistake in a card is told without all the other things it is not."""
    if isinstance(model, str):
        return "id"
    keys = (
        model
        if isinstance(model, Mapping)
        else type(model).model_fields
        if isinstance(model, BaseModel)
        else ()
    )
    return "card" if "family" in keys else "serving" if "serving" in keys else "weights"


Model = Annotated[
    Annotated[str, Tag("id")]
    | Annotated[ServingOverride, Tag("serving")]
    | Annotated[UncardedModel, Tag("weights")]
    | Annotated[ModelCard, Tag("card")],
    Discriminator(_tag),
]
"""A card's id, alone or with what is otherwise here; weights by name; or a whole card, written in place."""


class GatewayScaling(BuilderArgs):
    """The front floor's share."""

    ingresses: int = Field(1, ge=1, description="Replicas that answer HTTP.")
    dispatchers: int = Field(1, ge=1, description="Replicas that carry jobs to models.")


class AppArgs(GatewayScaling):
    """`args` of serve_app.app:build: everything in one application."""

    models: list[Model] = Field(min_length=1)
    encoder: EncoderArgs = EncoderArgs()


class GatewayArgs(GatewayScaling):
    """`args` of serve_app.app:build_gateway: the front floor without models."""


class WeightsArgs(BuilderArgs):
    """`args` of serve_app.app:build_weights: whose weights shall be near."""

    models: list[Model] = Field(min_length=1)


class ModelArgs(BuilderArgs):
    """`args` of serve_app.app:build_model: the cards that share one pool of replicas."""

    models: list[Model] = Field(min_length=1, description="One, or all of one group.")
    encoder: EncoderArgs = EncoderArgs()
    gateway: str = Field(GATEWAY, description="Application that sends requests here and keeps LoRA files.")


def select_cards(
    models: Sequence[str | ServingOverride | UncardedModel | ModelCard],
    known: Mapping[str, ModelCard],
    cards_dir: Path,
) -> dict[str, ModelCard]:
    """The cards of `models`, by id, in their order. Raises NotFound naming the cards there are,
    BadRequest."""
    selected: dict[str, ModelCard] = {}
    for model in models:
        if isinstance(model, UncardedModel):
            card = card_without_file(model.id, model.weights)
        elif isinstance(model, ModelCard):
            card = model
        elif isinstance(model, ServingOverride):
            card = _with_serving(_known(model.id, known, cards_dir), model.serving)
        else:
            card = _known(model, known, cards_dir)
        selected[card.id] = card
    return selected


def _known(card_id: str, known: Mapping[str, ModelCard], cards_dir: Path) -> ModelCard:
    if card_id not in known:
        raise NotFound(f"there is no card {card_id!r} in {cards_dir}; there is {', '.join(known)}")
    return known[card_id]


def _with_serving(card: ModelCard, serving: Mapping[str, Any]) -> ModelCard:
    try:
        changed = Serving.model_validate({**card.serving.model_dump(), **serving})
    except ValidationError as error:
        raise BadRequest(f"serving of {card.id} is not valid: {error}") from error
    return card.model_copy(update={"serving": changed})
