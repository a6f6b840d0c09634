"""Uploaded pictures, decoded once in full before a job is accepted, so that no replica meets a forged one."""

from __future__ import annotations

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor

from deployments.protocol.errors import BadRequest
from deployments.protocol.request import GenerationRequest
from deployments.sandbox.decoder import PROCESSES, DecodeMode, decoder_pool
from deployments.validation.image_header import inspect
from deployments.validation.resolve import control_field

THUMBNAIL_SIDE = 256  # pixels


class InputCheck:
    """Has pictures decoded in other processes; few at once, so that a flood of uploads starves nobody."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(PROCESSES, thread_name_prefix="picture-check")

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
                await loop.run_in_executor(
                    self._threads, decoder_pool().decode, data, DecodeMode.check, field
                )

    async def thumbnail(self, data: bytes, field: str) -> bytes:
        """The picture as a small WebP file. Raises as `verify` does."""
        _inspect(data, field)
        return await asyncio.get_running_loop().run_in_executor(self._threads, _thumbnail, data, field)


def _thumbnail(data: bytes, field: str) -> bytes:
    picture = decoder_pool().decode(data, DecodeMode.picture, field)
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=80)
    return file.getvalue()


def _inspect(data: bytes, field: str) -> None:
    if not data:
        raise BadRequest(f"{field} is empty; send a PNG, JPEG or WebP file", param=field)
    inspect(data, field)
