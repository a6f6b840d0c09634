"""GET /v1/models and /v1/models/{id}."""

import time
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from deployments.protocol.card import ModelCard
from serve_app.admission.model_aliases import resolve_model
from serve_app.api.auth import CurrentCaller

router = APIRouter(tags=["openai"])
STARTED = int(time.time())


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix seconds at which this service began to serve.")
    owned_by: str
    tasks: list[str] = Field(description="What it can do: t2i, i2i, inpaint, edit, t2v, i2v, refine.")


class ModelEntries(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


@router.get("/v1/models")
async def list_models(caller: CurrentCaller) -> ModelEntries:
    """The models served here."""
    return ModelEntries(data=[_entry(card) for card in caller.state.cards.values()])


@router.get("/v1/models/{model:path}")
async def read_model(model: str, caller: CurrentCaller) -> ModelEntry:
    """One model, by id or alias, also one of the operator's."""
    card, _ = resolve_model(model, caller.state.cards, caller.state.settings.model_aliases)
    return _entry(card)


def _entry(card: ModelCard) -> ModelEntry:
    return ModelEntry(id=card.id, created=STARTED, owned_by="weft", tasks=list(card.tasks))
