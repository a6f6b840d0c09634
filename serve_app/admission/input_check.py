"""Uploaded pictures, decoded once in full before a job is accepted, so that no replica gets a forged one."""

from __future__ import annotations

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor

from deployments.protocol.errors import BadRequest
from deployments.protocol.request import GenerationRequest
from deployments.sandbox.decoder import PROCESSES, DecodeMode, decoder_pool
from deployments.validation.image_header import ImageHeader, read_image_header
from deployments.validation.inputs import control_field, reference_field
from serve_app.admission.fair_slots import FairSlots

THUMBNAIL_SIDE = 256  # pixels
WAIT_S = 60.0


class InputCheck:
    """Decodes pictures in the sandbox; at most PROCESSES at once, so that uploads leave CPU time for other
    calls, and in turn where several owners wait: one picture may take ten seconds."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(PROCESSES, thread_name_prefix="input-check")
        self._slots = FairSlots(PROCESSES, PROCESSES, WAIT_S, "pictures")

    async def verify(self, request: GenerationRequest, owner: str) -> None:
        """Return when every picture of the request has been decoded to its last pixel.

        Raises TooLarge for the size that a header claims, BadRequest when it is no intact PNG, JPEG or WebP
        file, Overloaded where others' pictures take too long.
        """
        files: list[tuple[str, bytes | None]] = [
            (control_field(request, index), control.image) for index, control in enumerate(request.controls)
        ]
        files += [(reference_field(request, index), data) for index, data in enumerate(request.references)]
        if request.edit is not None:
            files += [("image", request.edit.image), ("mask_image", request.edit.mask_image)]
        if request.video is not None:
            files.append(("last_image", request.video.last_image))
        given = [(field, data) for field, data in files if data is not None]
        for field, data in given:
            _check_header(data, field)
        loop = asyncio.get_running_loop()
        for field, data in given:
            async with self._slots.hold(owner):
                await loop.run_in_executor(
                    self._threads, decoder_pool().decode, data, DecodeMode.check, field
                )

    async def thumbnail(self, data: bytes, field: str, owner: str) -> bytes:
        """The picture as a WebP file of at most THUMBNAIL_SIDE pixels a side. Raises as `verify` does."""
        header = _check_header(data, field)
        async with self._slots.hold(owner):
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, _thumbnail, data, field, header.orientation
            )


def _thumbnail(data: bytes, field: str, orientation: int) -> bytes:
    picture = decoder_pool().decode(data, DecodeMode.picture, field, orientation)
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=80)
    return file.getvalue()


def _check_header(data: bytes, field: str) -> ImageHeader:
    if not data:
        raise BadRequest(f"{field} is empty; send a PNG, JPEG or WebP file", param=field)
    return read_image_header(data, field)
