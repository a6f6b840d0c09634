"""Pictures that a caller sent, decoded to plain pixels of the size the request asks for."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

from deployments.protocol import pictures
from deployments.protocol.errors import BadRequest


def picture(data: bytes, width: int, height: int, field: str) -> Image.Image:
    """RGB, width x height pixels; EXIF and ICC are dropped, transparency lies on white.

    Raises BadRequest or TooLarge as `pictures.inspect` does, or when the body is broken.
    """
    return own_size(data, field).resize((width, height), Image.Resampling.LANCZOS)


def own_size(data: bytes, field: str) -> Image.Image:
    """RGB as `picture` gives it, in the size it has in the file."""
    decoded = _decode(data, field)
    if decoded.has_transparency_data:
        decoded = decoded.convert("RGBA")
        white = Image.new("RGBA", decoded.size, "white")
        decoded = Image.alpha_composite(white, decoded)
    return decoded.convert("RGB")


def mask(data: bytes, width: int, height: int, field: str) -> Image.Image:
    """L, width x height pixels, only 0 (keep) and 255 (paint anew)."""
    grey = _decode(data, field).convert("L").resize((width, height), Image.Resampling.NEAREST)
    return grey.point(lambda value: 255 if value >= 128 else 0)


def _decode(data: bytes, field: str) -> Image.Image:
    pictures.inspect(data, field)
    try:
        with Image.open(io.BytesIO(data), formats=pictures.FORMATS) as opened:
            opened.load()
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
                return upright.convert("I").point(lambda value: value * (1 / 256)).convert("L")
            return upright
    except (OSError, ValueError, SyntaxError, EOFError):
        raise BadRequest(f"{field} is damaged: its pixels cannot be read", param=field) from None
