"""Format and size of a picture file, read from its header before a single pixel is decoded."""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from deployments.protocol.errors import BadRequest, TooLarge
from deployments.sandbox.decoder_child import FORMATS, MAX_PIXELS

MAX_FILE_BYTES = 20 * 2**20
MIN_SIDE = 16
ORIENTATION = 0x0112  # EXIF tag of the camera's rotation; values from 5 swap width and height
FIRST_QUARTER_TURN = 5


class ImageSize(NamedTuple):
    """Of an upright picture, in pixels."""

    width: int
    height: int


def read_image_size(data: bytes, field: str) -> ImageSize:
    """Width and height of the upright picture. field: the request's field, for messages.

    Raises TooLarge over 20 MiB or 16 megapixels, BadRequest when it is no PNG, JPEG or WebP file.
    A 9.9 kB PNG may claim 81 megapixels; Pillow warns only past 89 and allocates first.
    """
    if len(data) > MAX_FILE_BYTES:
        raise TooLarge(f"{field} has {len(data)} bytes; at most {MAX_FILE_BYTES}", param=field)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
            if picture.format != "PNG" and picture.getexif().get(ORIENTATION, 1) >= FIRST_QUARTER_TURN:
                width, height = height, width
    except (
        UnidentifiedImageError,
        OSError,
        ValueError,
        SyntaxError,
        struct.error,
        Image.DecompressionBombError,
    ):
        raise BadRequest(
            f"{field} is not a readable picture; send a PNG, JPEG or WebP file", param=field
        ) from None
    if width * height > MAX_PIXELS:
        raise TooLarge(
            f"{field} is {width}x{height}; at most {MAX_PIXELS // 1_000_000} megapixels", param=field
        )
    if min(width, height) < MIN_SIDE:
        raise BadRequest(
            f"{field} is {width}x{height}; each side needs at least {MIN_SIDE} pixels", param=field
        )
    return ImageSize(width, height)
