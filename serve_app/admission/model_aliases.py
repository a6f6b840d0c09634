"""Names of models that are fixed in clients of other services, and the models that they stand for."""

from __future__ import annotations

from collections.abc import Mapping

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest, NotFound
from serve_app.admission.validation import find_card

ANY = "*"  # stands for every name that is not known
CURE = (
    "An operator can let names that clients send stand for models of this service: "
    "WEFT_MODEL_ALIASES=NAME=MODEL, or *=MODEL for all."
)


def resolve_model(
    name: str, cards: Mapping[str, ModelCard], aliases: Mapping[str, str]
) -> tuple[ModelCard, tuple[Adjustment, ...]]:
    """The card that this name means, and a warning where that is by an alias of the operator's.

    A model's own names count first; case is ignored. Raises BadRequest for an empty name, NotFound, which
    names the setting, for one that means nothing here.
    """
    if not name:
        raise BadRequest("model must have at least 1 character; leave it out for the default", param="model")
    try:
        return find_card(name, cards), ()
    except NotFound as error:
        target = _target(name, aliases)
        if target is None:
            raise NotFound(f"{error.message} {CURE}", param="model") from None
    try:
        card = find_card(target, cards)
    except NotFound as error:
        raise NotFound(
            f"{name[:200]!r} stands for {target!r} by WEFT_MODEL_ALIASES; {error.message}", param="model"
        ) from None
    message = f"{name[:200]!r} stands for {card.id} here (WEFT_MODEL_ALIASES), which made the result"
    return card, (Adjustment("model_aliased", "model", message),)


def _target(name: str, aliases: Mapping[str, str]) -> str | None:
    folded = {known.casefold(): model for known, model in aliases.items()}
    return folded.get(name.casefold(), folded.get(ANY))
