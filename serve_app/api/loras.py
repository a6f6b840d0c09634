"""Adapters of one's own: register, list, show, delete."""

from typing import Annotated

from fastapi import APIRouter, Path, Response
from starlette.requests import Request

from deployments.protocol.errors import Forbidden
from serve_app.admission.principals import Role
from serve_app.api.request_body import documented, read_json_or_form
from serve_app.api.schemas.lora import LoraDeleted, LoraList, LoraOut, RegisterLoraBody
from serve_app.api.state import CallerContext, CurrentCaller
from serve_app.loras.record import LoraRecord

router = APIRouter(tags=["loras"])
FILES = ("file", "preview")
LoraId = Annotated[str, Path(alias="id", max_length=200, description="Id or name.")]


@router.post("/api/loras", status_code=201, openapi_extra=documented(RegisterLoraBody, FILES))
async def register(http_request: Request, caller: CurrentCaller) -> LoraOut:
    """Keep an adapter: a form with the safetensors file, or JSON with `url`, `base64` or `hub`.

    It is read and checked before it is kept. The same file again changes what is said of it.
    """
    body = await read_json_or_form(http_request, RegisterLoraBody, FILES)
    if body.public and caller.principal.role is not Role.admin:
        raise Forbidden("only an admin may register an adapter for everybody; leave public out")
    spec = body.to_spec()
    preview = None if body.preview is None else await caller.state.pictures.thumbnail(body.preview, "preview")
    return lora_out(await caller.adapters.register(spec, caller.owner, body.label(preview)), caller)


@router.get("/api/loras")
@router.get("/api/loras/", include_in_schema=False)
async def list_adapters(caller: CurrentCaller) -> LoraList:
    """The caller's own adapters, the public ones, and those that come with the models."""
    return LoraList(loras=[lora_out(adapter, caller) for adapter in await caller.adapters.list(caller.owner)])


@router.get("/api/loras/{id}")
async def read_adapter(lora_id: LoraId, caller: CurrentCaller) -> LoraOut:
    """One adapter, by id or name."""
    return lora_out(await caller.adapters.get(lora_id, caller.owner), caller)


@router.get(
    "/api/loras/{id}/preview",
    response_class=Response,
    responses={200: {"content": {"image/webp": {}}}},
)
async def read_preview(lora_id: LoraId, caller: CurrentCaller) -> Response:
    """Its picture, where it was registered with one."""
    return Response(await caller.adapters.preview(lora_id, caller.owner), media_type="image/webp")


@router.delete("/api/loras/{id}")
async def delete_adapter(lora_id: LoraId, caller: CurrentCaller) -> LoraDeleted:
    """Forget an adapter of one's own. Jobs that wait with it still run; then its file goes."""
    return await delete_lora(lora_id, caller)


async def delete_lora(lora_id: str, caller: CallerContext) -> LoraDeleted:
    """Delete it, and say so."""
    admin = caller.principal.role is Role.admin
    adapter = await caller.adapters.delete(lora_id, caller.owner, admin=admin)
    return LoraDeleted(id=adapter.id)


def lora_out(adapter: LoraRecord, caller: CallerContext) -> LoraOut:
    """The adapter as this caller sees it."""
    admin = caller.principal.role is Role.admin
    return LoraOut.of(adapter, caller.owner, caller.prefix, admin=admin)
