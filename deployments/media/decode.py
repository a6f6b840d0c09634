"""Pictures sent by a caller, decoded to pixels of the size of the request."""

from __future__ import annotations

from PIL import Image

from deployments.sandbox.decoder import DecodeMode, decoder_pool
from deployments.validation.image_header import read_image_header


def picture(data: bytes, width: int, height: int, field: str) -> Image.Image:
    """RGB, width x height pixels. EXIF and ICC are removed, transparent pixels are blended with white.

    Raises BadRequest or TooLarge as `read_image_header` does, BadRequest also for broken image data.
    """
    return own_size(data, field).resize((width, height), Image.Resampling.LANCZOS)


def own_size(data: bytes, field: str) -> Image.Image:
    """RGB as `picture` returns it, in the size of the file."""
    return _decoded(data, DecodeMode.picture, field)


def mask(data: bytes, width: int, height: int, field: str) -> Image.Image:
    """L, width x height pixels, only 0 (keep) and 255 (repaint)."""
    grey = _decoded(data, DecodeMode.mask, field).resize((width, height), Image.Resampling.NEAREST)
    return grey.point(lambda value: 255 if value >= 128 else 0)


def _decoded(data: bytes, mode: DecodeMode, field: str) -> Image.Image:
    header = read_image_header(data, field)
    return decoder_pool().decode(data, mode, field, header.orientation)
