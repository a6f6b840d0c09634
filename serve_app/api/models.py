"""The models served here with their limits, and the LoRAs for them."""

import asyncio

from fastapi import APIRouter

from deployments.planning.expected import expected_plan
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import Forbidden, NotFound
from serve_app.admission.validation import find_card
from serve_app.api.auth import CurrentCaller
from serve_app.api.caller import CallerContext
from serve_app.api.loras import delete_lora, lora_out
from serve_app.api.schemas.lora import LoraDeleted, LoraOut
from serve_app.api.schemas.model import ModelList, ModelOut

router = APIRouter(tags=["models"])


@router.get("/api/models/")
@router.get("/api/models", include_in_schema=False)
async def list_models(caller: CurrentCaller) -> ModelList:
    """Every model with its limits and its state, and every LoRA that the caller may use with them."""
    records = [] if caller.state.lora_service is None else await caller.lora_service.list(caller.owner)
    models = await _models_out(caller, list(caller.state.cards.values()))
    return ModelList(models=models, adapters=[lora_out(record, caller) for record in records])


@router.get("/api/models/{model:path}")
async def read_model(model: str, caller: CurrentCaller) -> ModelOut | LoraOut:
    """One model by id or alias, or one LoRA by id or name."""
    try:
        card = find_card(model, caller.state.cards)
    except NotFound as no_model:
        if caller.state.lora_service is None:
            raise
        try:
            return lora_out(await caller.lora_service.get(model, caller.owner), caller)
        except NotFound:
            raise no_model from None
    return (await _models_out(caller, [card]))[0]


@router.delete("/api/models/{model:path}")
async def delete_model(model: str, caller: CurrentCaller) -> LoraDeleted:
    """Delete one of the caller's LoRAs, as DELETE /api/loras/{id} does."""
    try:
        card = find_card(model, caller.state.cards)
    except NotFound:
        return await delete_lora(model, caller)
    raise Forbidden(f"{card.id} is a base model and stays; only adapters are deleted here", param="model")


async def _models_out(caller: CallerContext, cards: list[ModelCard]) -> list[ModelOut]:
    state = caller.state
    ids = [card.id for card in cards]
    states, failures, proofs, plans = await asyncio.gather(
        state.model_states(), state.model_failures(), state.model_proofs(ids), state.model_plans(ids)
    )
    return [
        ModelOut.of(
            card,
            states.get(card.id, "absent"),
            proofs.get(card.id),
            failures.get(card.id),
            (plans.get(card.id) or {}).get(card.id) or expected_plan(card, state.cards),
        )
        for card in cards
    ]
