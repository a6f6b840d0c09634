"""Format, size and orientation of a picture file, read from its header before a single pixel is decoded."""

from __future__ import annotations

from typing import NamedTuple

from deployments.protocol.errors import BadRequest, TooLarge
from deployments.sandbox.decoder_child import MAX_PIXELS
from deployments.validation.image_formats import BadHeader, read_jpeg, read_png, read_webp
from deployments.validation.orientation import FIRST_QUARTER_TURN

MAX_FILE_BYTES = 20 * 2**20
MIN_SIDE = 16
_READERS = {"PNG": read_png, "JPEG": read_jpeg, "WEBP": read_webp}
# what people send instead; the mark and where it begins
_OTHERS = (
    (b"GIF8", 0, "a GIF"),
    (b"BM", 0, "a BMP"),
    (b"II*\0", 0, "a TIFF"),
    (b"MM\0*", 0, "a TIFF"),
    (b"8BPS", 0, "a Photoshop"),
    (b"%PDF", 0, "a PDF"),
    (b"<svg", 0, "an SVG"),
    (b"<?xml", 0, "an SVG or XML"),
    (b"ftypavif", 4, "an AVIF"),
    (b"ftypheic", 4, "a HEIC"),
    (b"ftypmif1", 4, "a HEIC or AVIF"),
    (b"\0\0\0\x0cJXL ", 0, "a JPEG XL"),
    (b"\xff\x0a", 0, "a JPEG XL"),
)


class ImageSize(NamedTuple):
    """Of an upright picture, in pixels."""

    width: int
    height: int


class ImageHeader(NamedTuple):
    """What the header of a picture file says."""

    format: str  # PNG, JPEG or WEBP
    width: int  # pixels, as stored
    height: int
    orientation: int  # 1 to 8, as EXIF numbers them: how to turn the stored picture upright

    @property
    def upright_size(self) -> ImageSize:
        if self.orientation >= FIRST_QUARTER_TURN:
            return ImageSize(self.height, self.width)
        return ImageSize(self.width, self.height)


def read_image_size(data: bytes, field: str) -> ImageSize:
    """Width and height of the upright picture. Raises as read_image_header does."""
    return read_image_header(data, field).upright_size


def read_image_header(data: bytes, field: str) -> ImageHeader:
    """The header of a picture file, in at most about 1 ms. field: the request's field, for messages.

    Raises TooLarge over 20 MiB or 16 megapixels, BadRequest when it is no PNG, JPEG or WebP file, or one with
    far more metadata than cameras write. A 9.9 kB PNG may claim 81 megapixels; Pillow warns only past 89 and
    allocates first.
    """
    if len(data) > MAX_FILE_BYTES:
        raise TooLarge(f"{field} has {len(data)} bytes; at most {MAX_FILE_BYTES}", param=field)
    name = _format(data)
    if name is None:
        raise _unreadable(field, _other_format(data))
    try:
        width, height, orientation = _READERS[name](data)
    except BadHeader as error:
        raise _unreadable(field, f"as {name}, {error}") from None
    if width * height > MAX_PIXELS:
        raise TooLarge(
            f"{field} is {width}x{height}; at most {MAX_PIXELS // 1_000_000} megapixels", param=field
        )
    if min(width, height) < MIN_SIDE:
        raise BadRequest(
            f"{field} is {width}x{height}; each side needs at least {MIN_SIDE} pixels", param=field
        )
    return ImageHeader(name, width, height, orientation)


def _format(data: bytes) -> str | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def _other_format(data: bytes) -> str:
    name = next((name for mark, at, name in _OTHERS if data.startswith(mark, at)), None)
    return "its first bytes are those of no picture" if name is None else f"it is {name} file"


def _unreadable(field: str, why: str) -> BadRequest:
    return BadRequest(
        f"{field} is not a readable picture ({why}); send a PNG, JPEG or WebP file", param=field
    )
