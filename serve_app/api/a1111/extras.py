"""/sdapi/v1/png-info and the calls that enlarge images."""

from __future__ import annotations

import asyncio
import base64
import re
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request

from deployments.protocol.errors import BadRequest
from deployments.validation.image_header import read_image_header
from serve_app.api.a1111.pictures import UPSCALERS, enlarged, resized
from serve_app.api.a1111.png_text import SIGNATURE, png_texts
from serve_app.api.a1111.schemas import MAX_IMAGES, A1111Body
from serve_app.api.auth import CurrentCaller
from serve_app.api.request_body import documented, read_json
from serve_app.api.schemas.files import ImageBytes
from serve_app.api.schemas.numbers import Int

router = APIRouter(tags=["a1111"])
TO_SIZE = 1  # of resize_mode: upscaling_resize_w and _h; 0: by upscaling_resize
SETTING = re.compile(r'\s*(\w[\w -]{0,60}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


class PngInfoBody(A1111Body):
    """Body of /sdapi/v1/png-info."""

    image: ImageBytes = Field(repr=False)


class ExtrasBody(A1111Body):
    """What both calls that enlarge images take."""

    resize_mode: Int = Field(0, ge=0, le=1)
    upscaling_resize: float = Field(2.0, gt=0, le=8)
    upscaling_resize_w: Int = Field(512, ge=1, le=16_384)
    upscaling_resize_h: Int = Field(512, ge=1, le=16_384)
    upscaling_crop: bool = True
    upscaler_1: str = Field("None", max_length=100)


class ExtraImageBody(ExtrasBody):
    """Body of /sdapi/v1/extra-single-image."""

    image: ImageBytes = Field(repr=False)


class NamedImage(A1111Body):
    data: ImageBytes = Field(repr=False)
    name: str = Field("", max_length=200)


class ExtraBatchBody(ExtrasBody):
    """Body of /sdapi/v1/extra-batch-images."""

    image_list: list[NamedImage] = Field(alias="imageList", min_length=1, max_length=MAX_IMAGES)


@router.post("/sdapi/v1/png-info", openapi_extra=documented(PngInfoBody))
async def read_png_info(http_request: Request, caller: CurrentCaller) -> dict[str, Any]:  # noqa: ARG001
    """The settings in a PNG file that this service or A1111 has made."""
    body = await read_json(http_request, PngInfoBody)
    if not body.image.startswith(SIGNATURE):
        raise BadRequest("png-info reads PNG files only; send the file as it was made", param="image")
    read_image_header(body.image, "image")
    texts = png_texts(body.image)
    info = texts.get("parameters", "")
    return {"info": info, "items": texts, "parameters": _settings(info)}


@router.post("/sdapi/v1/extra-single-image", openapi_extra=documented(ExtraImageBody))
async def enlarge_image(http_request: Request, caller: CurrentCaller) -> dict[str, Any]:
    """Enlarge an image by an interpolation; no model takes part."""
    body = await read_json(http_request, ExtraImageBody)
    await caller.body_slot.aclose()
    image = await asyncio.to_thread(_enlarged, body, body.image, "image")
    return {"image": image, "html_info": _info(body)}


@router.post("/sdapi/v1/extra-batch-images", openapi_extra=documented(ExtraBatchBody))
async def enlarge_images(http_request: Request, caller: CurrentCaller) -> dict[str, Any]:
    """The same for several images."""
    body = await read_json(http_request, ExtraBatchBody)
    await caller.body_slot.aclose()
    images = []
    for index, named in enumerate(body.image_list):
        images.append(await asyncio.to_thread(_enlarged, body, named.data, f"imageList.{index}.data"))
    return {"images": images, "html_info": _info(body)}


def _enlarged(body: ExtrasBody, image: bytes, field: str) -> str:
    if body.resize_mode == TO_SIZE:
        size = (body.upscaling_resize_w, body.upscaling_resize_h)
        data = resized(image, field, size, crop=body.upscaling_crop, upscaler=body.upscaler_1)
    else:
        data = enlarged(image, field, body.upscaling_resize, body.upscaler_1)
    return base64.b64encode(data).decode()


def _info(body: ExtrasBody) -> str:
    """A warning where another upscaler did it than was asked for."""
    if body.upscaler_1 in UPSCALERS:
        return ""
    return f"upscaler_1 is not one of {', '.join(UPSCALERS)}; {UPSCALERS[1]} enlarged the image"


def _settings(info: str) -> dict[str, str]:
    """The settings in A1111's text: prompt, negative prompt, and the values of its last line."""
    lines = info.strip().split("\n")
    if not info.strip():
        return {}
    found: dict[str, str] = {}
    if "Steps:" in lines[-1]:
        found = {name: value.strip('" ') for name, value in SETTING.findall(lines.pop()[:100_000])}
    text = "\n".join(lines)
    prompt, _, negative = text.partition("Negative prompt: ")
    return {"Prompt": prompt.strip(), "Negative prompt": negative.strip(), **found}
