"""A request against the model cards and the limits of this installation (pure)."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest, ModelUnavailable, NotFound
from deployments.protocol.request import GenerationRequest, Task
from deployments.validation.resolve import Resolved, resolve

MAX_COST_MPX_STEPS = 2_000.0  # of one request: 4 pictures of 4.2 megapixels at 100 steps cost 1,678


def validate(request: GenerationRequest, cards: Mapping[str, ModelCard], fresh_seed: int) -> Resolved:
    """The request as it will run, with the adjustments to report to its caller.

    fresh_seed: used where the caller gave none, 0..2^63-1.
    Raises NotFound for an unknown model, BadRequest or TooLarge for what the card does not allow.
    """
    card = find_card(request.model, cards)
    resolved = resolve(request, card, fresh_seed=fresh_seed)
    cost = resolved.request.cost_mpx_steps
    if cost > MAX_COST_MPX_STEPS:
        raise BadRequest(
            f"this request costs {cost:.0f} megapixel-steps (pictures x megapixels x steps); "
            f"at most {MAX_COST_MPX_STEPS:.0f}: ask for fewer pictures or steps, or a smaller size",
            param="num_images",
        )
    return resolved


def find_card(name: str, cards: Mapping[str, ModelCard]) -> ModelCard:
    """The card with this id or alias, ignoring case. Raises NotFound naming the models there are."""
    if name in cards:
        return cards[name]
    by_name = {known.casefold(): card for card in cards.values() for known in (card.id, *card.aliases)}
    card = by_name.get(name.casefold())
    if card is not None:
        return card
    near = difflib.get_close_matches(name.casefold(), by_name, n=1)
    guess = f" Did you mean {by_name[near[0]].id!r}?" if near else ""
    raise NotFound(
        f"there is no model {name[:200]!r} here; there is {', '.join(sorted(cards)) or 'none'}.{guess}",
        param="model",
    )


def default_model(
    task: Task,
    cards: Mapping[str, ModelCard],
    ready: Collection[str],
    *,
    controls: Collection[str] = (),
    refiner: bool = False,
    failed: Collection[str] = (),
) -> str:
    """Id of the model for a request that names none: the first that can serve it, loaded models first and
    `failed` ones last.

    controls: types of its control pictures. refiner: whether the model must have one.
    Raises BadRequest when no card can do that, ModelUnavailable while no model is served at all.
    """
    if not cards:
        raise ModelUnavailable("no model is served now; try again later", param="model")
    able = [
        card.id
        for card in cards.values()
        if task in card.tasks
        and all(kind in card.controls for kind in controls)
        and (card.refiner is not None or not refiner)
    ]
    if not able:
        with_controls = f" with control pictures of type {', '.join(sorted(controls))}" if controls else ""
        with_refiner = " and a refiner" if refiner else ""
        tasks = dict.fromkeys(known for card in cards.values() for known in card.tasks)
        raise BadRequest(
            f"no model here can do {task.value}{with_controls}{with_refiner}; "
            f"they can do {', '.join(tasks)}: see GET /api/models/",
            param="model",
        )
    return min(able, key=lambda model_id: (model_id in failed, model_id not in ready))
