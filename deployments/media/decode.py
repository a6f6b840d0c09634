"""Pictures sent by a caller, decoded to pixels."""

from __future__ import annotations

from PIL import Image

from deployments.media.fitting import fitted
from deployments.protocol.request import FitMode, MaskChannel
from deployments.sandbox.decoder import DecodeMode, decoder_pool
from deployments.validation.image_header import read_image_header

_MODES = {"luminance": DecodeMode.mask, "alpha": DecodeMode.holes}


def picture(data: bytes, width: int, height: int, field: str, fit: FitMode = "crop") -> Image.Image:
    """RGB, width x height pixels. EXIF and ICC are removed, transparent pixels are blended with white.

    fit: what becomes of another aspect ratio. Raises BadRequest or TooLarge as `read_image_header` does,
    BadRequest also for broken image data.
    """
    return fitted(own_size(data, field), (width, height), fit)


def own_size(data: bytes, field: str) -> Image.Image:
    """RGB as `picture` returns it, in the size of the file."""
    return _decoded(data, DecodeMode.picture, field)


def mask(data: bytes, channel: MaskChannel, field: str) -> Image.Image:
    """L, in the size of the file: 255 is generated anew, 0 is kept. Raises as `picture` does.

    channel: luminance marks white and keeps transparent pixels, alpha marks transparent ones.
    """
    return _decoded(data, _MODES[channel], field)


def _decoded(data: bytes, mode: DecodeMode, field: str) -> Image.Image:
    header = read_image_header(data, field)
    return decoder_pool().decode(data, mode, field, header.orientation)
