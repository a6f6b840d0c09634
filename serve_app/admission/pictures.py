"""Uploaded pictures, decoded once in full before a job is accepted, so that no replica meets a forged one."""

from __future__ import annotations

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from deployments.protocol.errors import BadRequest
from deployments.protocol.limits import control_field
from deployments.protocol.pictures import FORMATS, inspect
from deployments.protocol.request import GenerationRequest

DECODERS = 2  # pictures decoded at once; each may take 16 megapixels x 4 bytes


class PictureCheck:
    """Decodes pictures in its own few threads, so that a flood of uploads starves nobody else's."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(DECODERS, thread_name_prefix="picture-check")

    async def verify(self, request: GenerationRequest) -> None:
        """Return when every picture of the request can be read to its last pixel.

        Raises TooLarge by the size its header claims, BadRequest when it is no whole PNG, JPEG or WebP.
        """
        given: list[tuple[str, bytes | None]] = [
            (control_field(request, index), control.image) for index, control in enumerate(request.controls)
        ]
        if request.edit is not None:
            given += [("image", request.edit.image), ("mask_image", request.edit.mask_image)]
        loop = asyncio.get_running_loop()
        for field, data in given:
            if data is not None:
                _inspect(data, field)
                await loop.run_in_executor(self._threads, _decode, data, field)


def _inspect(data: bytes, field: str) -> None:
    if not data:
        raise BadRequest(f"{field} is empty; send a PNG, JPEG or WebP file", param=field)
    inspect(data, field)


def _decode(data: bytes, field: str) -> None:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            picture.load()
    except Exception as error:  # Pillow does not say which exceptions a forged file may raise
        raise BadRequest(
            f"{field} is damaged ({type(error).__name__}); save it anew as PNG, JPEG or WebP and send that",
            param=field,
        ) from None
