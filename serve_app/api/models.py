"""The models served here and what each can do, and the adapters trained for them."""

from fastapi import APIRouter

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import Forbidden, NotFound
from serve_app.admission.validation import find_card
from serve_app.api.loras import delete_lora, lora_out
from serve_app.api.schemas.lora import LoraDeleted, LoraOut
from serve_app.api.schemas.model import ModelList, ModelOut
from serve_app.api.state import CallerContext, CurrentCaller

router = APIRouter(tags=["models"])


@router.get("/api/models/")
@router.get("/api/models", include_in_schema=False)
async def list_models(caller: CurrentCaller) -> ModelList:
    """Every model with its limits and its state, and every adapter that the caller may use with them."""
    adapters = [] if caller.state.adapters is None else await caller.adapters.list(caller.owner)
    models = await _out(caller, list(caller.state.cards.values()))
    return ModelList(models=models, adapters=[lora_out(each, caller) for each in adapters])


@router.get("/api/models/{model:path}")
async def read_model(model: str, caller: CurrentCaller) -> ModelOut | LoraOut:
    """One model by id or alias, or one adapter by id or name."""
    try:
        card = find_card(model, caller.state.cards)
    except NotFound as no_model:
        if caller.state.adapters is None:
            raise
        try:
            return lora_out(await caller.adapters.get(model, caller.owner), caller)
        except NotFound:
            raise no_model from None
    return (await _out(caller, [card]))[0]


@router.delete("/api/models/{model:path}")
async def delete_model(model: str, caller: CurrentCaller) -> LoraDeleted:
    """Delete a trained adapter of one's own, as DELETE /api/loras/{id} does."""
    try:
        card = find_card(model, caller.state.cards)
    except NotFound:
        return await delete_lora(model, caller)
    raise Forbidden(f"{card.id} is a base model and stays; only adapters are deleted here", param="model")


async def _out(caller: CallerContext, cards: list[ModelCard]) -> list[ModelOut]:
    states = await caller.state.model_states()
    return [ModelOut.of(card, states.get(card.id, "absent")) for card in cards]
