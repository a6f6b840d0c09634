"""LoRAs of the caller: register, list, read, delete."""

from typing import Annotated

from fastapi import APIRouter, Path, Response
from starlette.requests import Request

from serve_app.admission.principals import Scope
from serve_app.api.auth import CurrentCaller
from serve_app.api.caller import CallerContext
from serve_app.api.request_body import documented, opened_body
from serve_app.api.schemas.lora import LoraDeleted, LoraList, LoraOut, RegisterLoraBody
from serve_app.loras.record import LoraRecord

router = APIRouter(tags=["loras"])
FILES = ("file", "preview")
LoraId = Annotated[str, Path(alias="id", max_length=200, description="Id or name.")]


@router.post("/api/loras", status_code=201, openapi_extra=documented(RegisterLoraBody, FILES))
async def register(http_request: Request, caller: CurrentCaller) -> LoraOut:
    """Store a LoRA: a form with the safetensors file, or JSON with `url`, `base64` or `hub`.

    It is read and checked before it is stored. Sending the same file again changes its description.
    """
    # a large file stays on disk while it is checked and stored
    async with (
        caller.state.uploads.hold(caller.owner),
        opened_body(http_request, RegisterLoraBody, FILES, on_disk=("file",)) as body,
    ):
        if body.public:
            caller.principal.require(Scope.admin)
        preview = None
        if body.preview is not None:
            preview = await caller.state.input_check.thumbnail(body.preview, "preview", caller.owner)
        label = body.to_label(preview)
        return lora_out(await caller.lora_service.register(body.to_spec(), caller.owner, label), caller)


@router.get("/api/loras")
@router.get("/api/loras/", include_in_schema=False)
async def list_adapters(caller: CurrentCaller) -> LoraList:
    """The caller's own LoRAs, the public ones, and those that come with the models."""
    return LoraList(
        loras=[lora_out(record, caller) for record in await caller.lora_service.list(caller.owner)]
    )


@router.get("/api/loras/{id}")
async def read_adapter(lora_id: LoraId, caller: CurrentCaller) -> LoraOut:
    """One LoRA, by id or name."""
    return lora_out(await caller.lora_service.get(lora_id, caller.owner), caller)


@router.get(
    "/api/loras/{id}/preview",
    response_class=Response,
    responses={200: {"content": {"image/webp": {}}}},
)
async def read_preview(lora_id: LoraId, caller: CurrentCaller) -> Response:
    """The preview image of a LoRA that was registered with one."""
    return Response(await caller.lora_service.preview(lora_id, caller.owner), media_type="image/webp")


@router.delete("/api/loras/{id}")
async def delete_adapter(lora_id: LoraId, caller: CurrentCaller) -> LoraDeleted:
    """Delete one of the caller's LoRAs. Jobs that wait with it still run; its file is deleted after them."""
    return await delete_lora(lora_id, caller)


async def delete_lora(lora_id: str, caller: CallerContext) -> LoraDeleted:
    """Delete it. Raises NotFound, Forbidden."""
    record = await caller.lora_service.delete(lora_id, caller.owner, admin=caller.is_admin)
    return LoraDeleted(id=record.id)


def lora_out(record: LoraRecord, caller: CallerContext) -> LoraOut:
    """The LoRA as this caller sees it."""
    return LoraOut.of(record, caller.owner, caller.prefix, admin=caller.is_admin)
