"""GET /v1/models and /v1/models/{id}."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from serve_app.admission.model_aliases import resolve_model
from serve_app.api.auth import CurrentCaller

router = APIRouter(tags=["openai"])


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str


class ModelEntries(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


@router.get("/v1/models")
async def list_models(caller: CurrentCaller) -> ModelEntries:
    """The models served here."""
    return ModelEntries(data=[_entry(model_id) for model_id in caller.state.cards])


@router.get("/v1/models/{model:path}")
async def read_model(model: str, caller: CurrentCaller) -> ModelEntry:
    """One model, by id or alias, also one of the operator's."""
    card, _ = resolve_model(model, caller.state.cards, caller.state.settings.model_aliases)
    return _entry(card.id)


def _entry(model_id: str) -> ModelEntry:
    return ModelEntry(id=model_id, owned_by="weft")
