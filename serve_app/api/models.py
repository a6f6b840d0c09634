"""The models served here and what each can do, and the adapters trained for them."""

from fastapi import APIRouter

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import Forbidden, NotFound
from serve_app.admission.rules import find_card
from serve_app.api.depends import Here, Visit
from serve_app.api.loras import forget, told
from serve_app.api.schemas.lora import LoraDeleted, LoraOut
from serve_app.api.schemas.model import ModelList, ModelOut

router = APIRouter(tags=["models"])


@router.get("/api/models/")
@router.get("/api/models", include_in_schema=False)
async def list_models(visit: Here) -> ModelList:
    """Every model with its limits and its state, and every adapter that the caller may use with them."""
    adapters = [] if visit.state.adapters is None else await visit.adapters.list(visit.owner)
    models = await _out(visit, list(visit.state.cards.values()))
    return ModelList(models=models, adapters=[told(each, visit) for each in adapters])


@router.get("/api/models/{model:path}")
async def read_model(model: str, visit: Here) -> ModelOut | LoraOut:
    """One model by id or alias, or one adapter by id or name."""
    try:
        card = find_card(model, visit.state.cards)
    except NotFound as no_model:
        if visit.state.adapters is None:
            raise
        try:
            return told(await visit.adapters.get(model, visit.owner), visit)
        except NotFound:
            raise no_model from None
    return (await _out(visit, [card]))[0]


@router.delete("/api/models/{model:path}")
async def delete_model(model: str, visit: Here) -> LoraDeleted:
    """Delete a trained adapter of one's own, as DELETE /api/loras/{id} does."""
    try:
        card = find_card(model, visit.state.cards)
    except NotFound:
        return await forget(model, visit)
    raise Forbidden(f"{card.id} is a base model and stays; only adapters are deleted here", param="model")


async def _out(visit: Visit, cards: list[ModelCard]) -> list[ModelOut]:
    states = await visit.state.model_states()
    return [ModelOut.of(card, states.get(card.id, "absent")) for card in cards]
