"""The `args` of an application in a Serve config file, one type per builder of serve_app/app.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SecretStr,
    Tag,
    ValidationError,
    field_validator,
)
from pydantic_core import PydanticCustomError

from deployments.protocol.card import ModelCard, Serving, Weights, with_current_keys
from deployments.protocol.errors import BadRequest, NotFound
from deployments.protocol.invalid_values import SECRET, suggestion, wrong_values
from serve_app.card_settings import as_set, refiners_of, with_base_model
from serve_app.ray_serve.default_card import default_card
from serve_app.settings import Settings

GATEWAY = "weft"  # default name of the gateway's application


SECRET_SETTINGS = frozenset(
    name
    for name, field in Settings.model_fields.items()
    if SecretStr in get_args(field.annotation) or field.annotation is SecretStr
)


class BuilderArgs(BaseModel):
    """Arguments of every builder. An unknown key is an error that names it."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    settings: dict[str, Any] = Field(
        {}, description="Settings of serve_app/settings.py for this application; no secrets."
    )

    @field_validator("settings", mode="before")
    @classmethod
    def _refuse_secrets(cls, values: Any) -> Any:
        """Serve logs arguments and shows them in Ray's dashboard."""
        for name in values if isinstance(values, Mapping) else ():
            if name in SECRET_SETTINGS:
                raise PydanticCustomError(
                    SECRET, "must not hold the secret {name}; set it in the environment", {"name": name}
                )
        return values


class UncardedModel(BaseModel):
    """Weights without a model card. Only FLUX variants may lack one; they run as FLUX.1 schnell."""

    model_config = ConfigDict(extra="forbid")

    id: str
    weights: Weights


class ServingOverride(BaseModel):
    """A model card of cards_dir, with other values of `serving`."""

    model_config = ConfigDict(extra="forbid")

    id: str
    serving: dict[str, Any] = Field(description="Values of `serving` that replace those of the card.")


class EncoderArgs(BaseModel):
    """The deployment that encodes frames into video files; it exists when a model generates videos."""

    model_config = ConfigDict(extra="forbid")

    threads: int = Field(2, ge=1, description="Threads that encode one video.")
    num_cpus: float = Field(
        0, ge=0, description="CPUs that a replica reserves in Ray. 0: it fits on any node."
    )
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(4, ge=1)


def _tag(model: object) -> str:
    """The tag of a value's type in `Model`, so that validation reports only the errors of that type."""
    if isinstance(model, str):
        return "id"
    keys = (
        model
        if isinstance(model, Mapping)
        else type(model).model_fields
        if isinstance(model, BaseModel)
        else ()
    )
    return "card" if "licence" in keys else "serving" if "serving" in keys else "weights"


Model = Annotated[
    Annotated[str, Tag("id")]
    | Annotated[ServingOverride, Tag("serving")]
    | Annotated[UncardedModel, Tag("weights")]
    | Annotated[ModelCard, Tag("card")],
    Discriminator(_tag),
]
"""The id of a card, alone or with other `serving` values; weights without a card; or a complete card."""


class GatewayScaling(BuilderArgs):
    """Replicas of the serving layer."""

    ingresses: int = Field(1, ge=1, description="Replicas that answer HTTP requests.")
    dispatchers: int = Field(1, ge=1, description="Replicas that send jobs to the models.")


class AppArgs(GatewayScaling):
    """`args` of serve_app.app:build: everything in one application."""

    models: list[Model] = Field(min_length=1)
    encoder: EncoderArgs = EncoderArgs()


class GatewayArgs(GatewayScaling):
    """`args` of serve_app.app:build_gateway: the serving layer without models."""


class WeightsArgs(BuilderArgs):
    """`args` of serve_app.app:build_weights: the models whose weights are downloaded to the nodes."""

    models: list[Model] = Field(min_length=1)


class ModelArgs(BuilderArgs):
    """`args` of serve_app.app:build_model: the cards that share one pool of replicas."""

    models: list[Model] = Field(min_length=1, description="One model, or all models of one group.")
    encoder: EncoderArgs = EncoderArgs()
    gateway: str = Field(
        GATEWAY, description="Application that sends requests to this one and stores its LoRA files."
    )


def select_cards(
    models: Sequence[str | ServingOverride | UncardedModel | ModelCard],
    known: Mapping[str, ModelCard],
    settings: Settings,
    *,
    one_application: bool,
) -> dict[str, ModelCard]:
    """The cards of `models`, by id, in the same order, as the settings have them run.

    known: the cards of the installation. one_application: whether these are all the models that are served.
    Raises NotFound listing the known cards, BadRequest for a card that is not valid.
    """
    selected: dict[str, ModelCard] = {}
    for model in models:
        if isinstance(model, UncardedModel):
            card = default_card(model.id, model.weights)
        elif isinstance(model, ModelCard):
            card = model
        elif isinstance(model, ServingOverride):
            card = _with_serving(_known(model.id, known, settings.cards_dir), model.serving)
        else:
            card = _known(model, known, settings.cards_dir)
        selected[card.id] = card
    cards = as_set(selected, settings, refiners_of(known))
    return with_base_model(cards, known, settings, one_application=one_application)


def _known(card_id: str, known: Mapping[str, ModelCard], cards_dir: Path) -> ModelCard:
    if card_id not in known:
        hint = suggestion(card_id, known) or f"; there is {', '.join(known)}"
        raise NotFound(f"there is no card {card_id!r} in {cards_dir}{hint}")
    return known[card_id]


def _with_serving(card: ModelCard, serving: Mapping[str, Any]) -> ModelCard:
    try:
        changed = Serving.model_validate({**card.serving.model_dump(), **with_current_keys(serving)})
    except ValidationError as error:
        raise BadRequest(
            f"serving of {card.id} is not valid: {wrong_values(error, Serving.model_fields)}"
        ) from None
    except ValueError as error:  # of with_current_keys
        raise BadRequest(f"serving of {card.id} is not valid: {error}") from error
    return card.model_copy(update={"serving": changed})
