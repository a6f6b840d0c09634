"""Enlarging images without a model."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

from deployments.protocol.errors import TooLarge
from deployments.sandbox.decoder import DecodeMode, decoder_pool
from deployments.sandbox.decoder_child import MAX_PIXELS
from deployments.validation.image_header import read_image_header

Size = tuple[int, int]
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}
UPSCALERS = ("None", "Lanczos", "Nearest")  # clients expect None as the first
SCALED = "lanczos"


def enlarged(image: bytes, field: str, scale: float, upscaler: str = SCALED) -> bytes:
    """The image with its sides times `scale`, as a PNG file. Blocks; call it in a thread.

    Raises BadRequest for a file that cannot be read, TooLarge for a result of more pixels than images may
    have that are sent in.
    """
    header = read_image_header(image, field)
    _check_pixels(round(header.width * scale), round(header.height * scale), field)
    picture = decoder_pool().decode(image, DecodeMode.picture, field, header.orientation)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return _saved(picture.resize(size, _filter(upscaler)))


def resized(image: bytes, field: str, size: Size, *, crop: bool, upscaler: str = SCALED) -> bytes:
    """The image in this size, as a PNG file; crop: its middle, else as large as fits in. Raises and blocks as
    `enlarged` does."""
    _check_pixels(*size, field)
    header = read_image_header(image, field)
    picture = decoder_pool().decode(image, DecodeMode.picture, field, header.orientation)
    shape = ImageOps.fit if crop else ImageOps.contain
    return _saved(shape(picture, size, _filter(upscaler)))


def _filter(upscaler: str) -> Image.Resampling:
    return FILTERS.get(upscaler.lower(), Image.Resampling.LANCZOS)


def _check_pixels(width: int, height: int, field: str) -> None:
    if width * height > MAX_PIXELS:
        raise TooLarge(
            f"the result would be {width}x{height}; at most {MAX_PIXELS // 1_000_000} megapixels: ask for a "
            "smaller one",
            param=field,
        )


def _saved(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()
