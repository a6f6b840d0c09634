"""The models served here and what each can do."""

from fastapi import APIRouter

from serve_app.admission.rules import find_card
from serve_app.api.depends import Here, Visit
from serve_app.api.schemas.model import ModelList, ModelOut

router = APIRouter(tags=["models"])


@router.get("/api/models/")
@router.get("/api/models", include_in_schema=False)
async def list_models(visit: Here) -> ModelList:
    """Every model with its limits and its state."""
    return ModelList(models=await _out(visit, list(visit.state.cards)))


@router.get("/api/models/{model:path}")
async def read_model(model: str, visit: Here) -> ModelOut:
    """One model, by id or alias."""
    card = find_card(model, visit.state.cards)
    return (await _out(visit, [card.id]))[0]


async def _out(visit: Visit, ids: list[str]) -> list[ModelOut]:
    states = await visit.state.model_states()
    return [ModelOut.of(visit.state.cards[model_id], states.get(model_id, "absent")) for model_id in ids]
