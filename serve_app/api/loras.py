"""Adapters of one's own: register, list, show, delete."""

from typing import Annotated

from fastapi import APIRouter, Path, Response
from starlette.requests import Request

from deployments.protocol.errors import Forbidden
from serve_app.adapters.record import Adapter
from serve_app.admission.principal import Role
from serve_app.api.bodies import documented, read_json_or_form
from serve_app.api.depends import Here, Visit
from serve_app.api.schemas.lora import LoraDeleted, LoraList, LoraOut, RegisterBody

router = APIRouter(tags=["loras"])
FILES = ("file", "preview")
LoraId = Annotated[str, Path(alias="id", max_length=200, description="Id or name.")]


@router.post("/api/loras", status_code=201, openapi_extra=documented(RegisterBody, FILES))
async def register(http_request: Request, visit: Here) -> LoraOut:
    """Keep an adapter: a form with the safetensors file, or JSON with `url`, `base64` or `hub`.

    It is read and checked before it is kept. The same file again changes what is said of it.
    """
    body = await read_json_or_form(http_request, RegisterBody, FILES)
    if body.public and visit.principal.role is not Role.admin:
        raise Forbidden("only an admin may register an adapter for everybody; leave public out")
    wish = body.wish()
    preview = None if body.preview is None else await visit.state.pictures.thumbnail(body.preview, "preview")
    return told(await visit.adapters.register(wish, visit.owner, body.label(preview)), visit)


@router.get("/api/loras")
@router.get("/api/loras/", include_in_schema=False)
async def list_adapters(visit: Here) -> LoraList:
    """The caller's own adapters, the public ones, and those that come with the models."""
    return LoraList(loras=[told(adapter, visit) for adapter in await visit.adapters.list(visit.owner)])


@router.get("/api/loras/{id}")
async def read_adapter(lora_id: LoraId, visit: Here) -> LoraOut:
    """One adapter, by id or name."""
    return told(await visit.adapters.get(lora_id, visit.owner), visit)


@router.get(
    "/api/loras/{id}/preview",
    response_class=Response,
    responses={200: {"content": {"image/webp": {}}}},
)
async def read_preview(lora_id: LoraId, visit: Here) -> Response:
    """Its picture, where it was registered with one."""
    return Response(await visit.adapters.preview(lora_id, visit.owner), media_type="image/webp")


@router.delete("/api/loras/{id}")
async def delete_adapter(lora_id: LoraId, visit: Here) -> LoraDeleted:
    """Forget an adapter of one's own. Jobs that wait with it still run; then its file goes."""
    return await forget(lora_id, visit)


async def forget(lora_id: str, visit: Visit) -> LoraDeleted:
    """Delete it, and say so."""
    admin = visit.principal.role is Role.admin
    adapter = await visit.adapters.delete(lora_id, visit.owner, admin=admin)
    return LoraDeleted(id=adapter.id)


def told(adapter: Adapter, visit: Visit) -> LoraOut:
    """The adapter as this caller sees it."""
    admin = visit.principal.role is Role.admin
    return LoraOut.of(adapter, visit.owner, visit.prefix, admin=admin)
