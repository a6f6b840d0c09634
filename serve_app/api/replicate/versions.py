"""/v1/models/{owner}/{name}/versions: a model has one version, itself."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import NotFound
from serve_app.api.auth import CurrentCaller
from serve_app.api.replicate.predictions import find_model
from serve_app.api.replicate.schemas import PredictionInput

router = APIRouter(tags=["replicate"])
COG = "0.9.0"  # the form of the schema
NO_TIME = "1970-01-01T00:00:00Z"  # a card has no date


@router.get("/v1/models/{owner}/{name}/versions")
async def list_versions(owner: str, name: str, caller: CurrentCaller) -> dict[str, Any]:
    """The one version."""
    card = find_model(caller, f"{owner}/{name}")
    return {"previous": None, "next": None, "results": [_version(card)]}


@router.get("/v1/models/{owner}/{name}/versions/{version}")
async def read_version(owner: str, name: str, version: str, caller: CurrentCaller) -> dict[str, Any]:
    """The inputs and outputs of the model."""
    card = find_model(caller, f"{owner}/{name}")
    if version != card.id:
        raise NotFound(f"{card.id} has no version {version[:100]!r}; it has {card.id}", param="version")
    return _version(card)


def _version(card: ModelCard) -> dict[str, Any]:
    output = {"type": "array", "items": {"type": "string", "format": "uri"}, "title": "Output"}
    schemas = {"Input": PredictionInput.model_json_schema(), "Output": output}
    return {
        "id": card.id,
        "created_at": NO_TIME,
        "cog_version": COG,
        "openapi_schema": {"openapi": "3.0.2", "components": {"schemas": schemas}},
    }
