"""Pictures sent by a caller, decoded to pixels."""

from __future__ import annotations

from PIL import Image

from deployments.protocol.request import MaskChannel
from deployments.sandbox.decoder import ON_WHITE, DecodeMode, decoder_pool
from deployments.validation.image_header import read_image_header

_MODES = {"luminance": DecodeMode.mask, "alpha": DecodeMode.holes}


def own_size(data: bytes, field: str) -> Image.Image:
    """RGB, in the size of the file. EXIF and ICC are removed, transparent pixels are blended with white.

    Raises BadRequest or TooLarge as `read_image_header` does, BadRequest also for broken image data.
    """
    return _decoded(data, DecodeMode.picture, field)


def is_on_white(picture: Image.Image) -> bool:
    """Whether a picture as `own_size` returns it was transparent somewhere, and is white there now."""
    return bool(picture.info[ON_WHITE])


def mask(data: bytes, channel: MaskChannel, field: str) -> Image.Image:
    """L, in the size of the file: 255 is generated anew, 0 is kept. Raises as `own_size` does.

    channel: luminance marks white and keeps transparent pixels, alpha marks transparent ones.
    """
    return _decoded(data, _MODES[channel], field)


def _decoded(data: bytes, mode: DecodeMode, field: str) -> Image.Image:
    header = read_image_header(data, field)
    return decoder_pool().decode(data, mode, field, header.orientation)
