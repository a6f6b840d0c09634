"""/sdapi/v1/options: of the caller, never of the service."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from deployments.protocol.errors import BadRequest, WeftError
from deployments.protocol.request import Task
from serve_app.admission.model_aliases import resolve_model
from serve_app.api.a1111.images import HASH
from serve_app.api.a1111.memory import options, set_options
from serve_app.api.a1111.names import NAMES
from serve_app.api.a1111.requests import CHECKPOINT
from serve_app.api.a1111.schemas import A1111Body
from serve_app.api.auth import CurrentCaller
from serve_app.api.foreign import renamed_error
from serve_app.api.request_body import documented, read_json
from serve_app.api.submit import choose_model

router = APIRouter(tags=["a1111"])


class OptionsBody(A1111Body):
    """Options by name; those that have no meaning here are ignored."""

    model_config = A1111Body.model_config | {"extra": "allow"}

    sd_model_checkpoint: str | None = None


@router.get("/sdapi/v1/options")
async def read_options(caller: CurrentCaller) -> dict[str, Any]:
    """The caller's options; the model is the default one until the caller chooses another."""
    found = await options(caller)
    if not found[CHECKPOINT]:
        try:
            found[CHECKPOINT] = await choose_model(caller, (Task.t2i,))
        except BadRequest:  # no model here makes images
            found[CHECKPOINT] = ""
    return found


@router.post("/sdapi/v1/options", openapi_extra=documented(OptionsBody))
async def write_options(http_request: Request, caller: CurrentCaller) -> None:
    """Choose the model of the caller's later calls: sd_model_checkpoint, a title that sd-models lists."""
    body = await read_json(http_request, OptionsBody)
    changed = body.model_dump(exclude_none=True)
    if body.sd_model_checkpoint:
        try:
            card, _ = resolve_model(
                HASH.sub("", body.sd_model_checkpoint),
                caller.state.cards,
                caller.state.settings.model_aliases,
            )
        except WeftError as error:
            raise renamed_error(error, NAMES) from None
        changed[CHECKPOINT] = card.id
    await set_options(caller, changed)
