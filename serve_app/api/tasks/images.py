"""POST /generate-image, /generate and /refine: the native image body, answered with a task id."""

from fastapi import APIRouter
from pydantic import AliasChoices, Field
from starlette.requests import Request

from serve_app.api.auth import CurrentCaller
from serve_app.api.native.image_body import IMAGE_FILES, ImageBody
from serve_app.api.request_body import documented, read_json_or_form
from serve_app.api.submit import submit
from serve_app.api.tasks.schemas import TaskAccepted

router = APIRouter(tags=["tasks"])


class SdxlServiceBody(ImageBody):
    """The same with the names of an SDXL service: `guidance` for `guidance_scale`."""

    guidance_scale: float | None = Field(
        None,
        validation_alias=AliasChoices("guidance_scale", "cfg_scale", "guidance"),
        description="How closely to follow the prompt; `cfg_scale` and `guidance` are other names for it.",
    )


@router.post("/generate", status_code=202, openapi_extra=documented(SdxlServiceBody, IMAGE_FILES))
async def generate(http_request: Request, caller: CurrentCaller) -> TaskAccepted:
    """Accept a request for images, as /generate-image does; `guidance` is a name of guidance_scale here."""
    body = await read_json_or_form(http_request, SdxlServiceBody, IMAGE_FILES)
    return TaskAccepted.of(await submit(caller, body))


@router.post("/generate-image", status_code=202, openapi_extra=documented(ImageBody, IMAGE_FILES))
async def generate_image(http_request: Request, caller: CurrentCaller) -> TaskAccepted:
    """Accept a request for images; the body is that of POST /api/generate/image."""
    return TaskAccepted.of(
        await submit(caller, await read_json_or_form(http_request, ImageBody, IMAGE_FILES))
    )


@router.post("/refine", status_code=202, openapi_extra=documented(SdxlServiceBody, IMAGE_FILES))
async def refine(http_request: Request, caller: CurrentCaller) -> TaskAccepted:
    """Redraw the details of the file `image` with a refiner; the body is that of /generate-image."""
    body = await read_json_or_form(http_request, SdxlServiceBody, IMAGE_FILES)
    return TaskAccepted.of(await submit(caller, body.model_copy(update={"refine": True})))
