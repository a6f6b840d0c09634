"""Transparency and depth of every form of picture: what becomes of pictures, and what masks mark."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deployments.media import decode

WIDE, HIGH = 32, 16
WHITE, RED = (255, 255, 255), (255, 0, 0)


def saved(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def halves(mode: str, left: Any, right: Any) -> Image.Image:
    picture = Image.new(mode, (WIDE, HIGH), left)
    picture.paste(right, (WIDE // 2, 0, WIDE, HIGH))
    return picture


def raw_png(depth: int, colour_type: int, left: bytes, right: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG whose rows are `left` and then `right`, in the forms that Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", WIDE, HIGH, depth, colour_type, 0, 0, 0)
    rows = (b"\0" + left + right) * HIGH
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def grey(depth: int, transparent: int | None = None) -> bytes:
    """Black, then the lightest grey of this depth."""
    side = WIDE // 2 * depth // 8
    chunks = () if transparent is None else ((b"tRNS", struct.pack(">H", transparent)),)
    return raw_png(depth, 0, b"\0" * side, b"\xff" * side, *chunks)


def ends(picture: Image.Image) -> tuple[Any, Any]:
    return picture.getpixel((0, 0)), picture.getpixel((WIDE - 1, HIGH - 1))


WHITE_IS_RIGHT = {
    "1 bit": grey(1),
    "2 bits": grey(2),
    "4 bits": grey(4),
    "8 bits": grey(8),
    "16 bits": grey(16),
    "bilevel": saved(halves("1", 0, 1)),
    "grey with alpha": saved(halves("LA", (0, 255), (255, 255))),
    "grey with alpha of 16 bits": raw_png(16, 4, b"\0\0\xff\xff" * 16, b"\xff\xff\xff\xff" * 16),
    "rgb": saved(halves("RGB", (0, 0, 0), WHITE)),
    "rgb of 16 bits": raw_png(16, 2, b"\0" * 96, b"\xff" * 96),
    "rgba": saved(halves("RGBA", (0, 0, 0, 255), (*WHITE, 255))),
    "palette": saved(halves("RGB", (0, 0, 0), WHITE).quantize(4)),
    "jpeg": saved(halves("L", 0, 255), "JPEG", quality=100),
    "cmyk jpeg": saved(halves("CMYK", (0, 0, 0, 255), (0, 0, 0, 0)), "JPEG", quality=100),
    "webp": saved(halves("RGB", (0, 0, 0), WHITE), "WEBP", lossless=True),
    # what is transparent is kept, whatever its colour
    "white strokes on transparent white": saved(halves("RGBA", (*WHITE, 0), (*WHITE, 255))),
    "the same as grey": saved(halves("LA", (255, 0), (255, 255))),
    "the same as webp": saved(halves("RGBA", (*WHITE, 0), (*WHITE, 255)), "WEBP", lossless=True, exact=True),
    "the same of 16 bits": raw_png(16, 6, b"\xff\xff\xff\xff\xff\xff\0\0" * 16, b"\xff" * 128),
    "palette with alpha": raw_png(8, 3, b"\0" * 16, b"\1" * 16, (b"PLTE", b"\xff" * 6), (b"tRNS", b"\0\xff")),
    "1 bit, black is transparent": grey(1, transparent=0),
    "2 bits, black is transparent": grey(2, transparent=0),
    "16 bits, black is transparent": grey(16, transparent=0),
}


@pytest.mark.parametrize("data", WHITE_IS_RIGHT.values(), ids=WHITE_IS_RIGHT)
def test_a_mask_marks_what_is_white_and_opaque(data: bytes) -> None:
    mask = decode.mask(data, "luminance", "mask_image")

    assert (mask.mode, mask.size) == ("L", (WIDE, HIGH))
    kept, marked = ends(mask)
    assert kept <= 2
    assert marked >= 253


RIGHT_IS_A_HOLE = {
    "rgba": saved(halves("RGBA", (9, 9, 9, 255), (9, 9, 9, 0))),
    "grey with alpha": saved(halves("LA", (9, 255), (9, 0))),
    "16 bits": raw_png(16, 6, b"\xff" * 128, b"\xff\xff\xff\xff\xff\xff\0\0" * 16),
    "palette": raw_png(8, 3, b"\1" * 16, b"\0" * 16, (b"PLTE", b"\xff" * 6), (b"tRNS", b"\0\xff")),
    "webp": saved(halves("RGBA", (9, 9, 9, 255), (9, 9, 9, 0)), "WEBP", lossless=True),
    "a colour of rgb": saved(halves("RGB", (0, 0, 0), RED), transparency=RED),
    "a colour of rgb of 16 bits": raw_png(16, 2, b"\0" * 96, b"\x12\x34" * 48, (b"tRNS", b"\x12\x34" * 3)),
    **{f"the white of {depth} bits": grey(depth, transparent=2**depth - 1) for depth in (1, 2, 4, 8, 16)},
}


@pytest.mark.parametrize("data", RIGHT_IS_A_HOLE.values(), ids=RIGHT_IS_A_HOLE)
def test_a_mask_by_alpha_marks_what_is_transparent(data: bytes) -> None:
    assert ends(decode.mask(data, "alpha", "mask_image")) == (0, 255)


@pytest.mark.parametrize("data", RIGHT_IS_A_HOLE.values(), ids=RIGHT_IS_A_HOLE)
def test_transparent_pixels_of_a_picture_become_white_and_others_stay(data: bytes) -> None:
    left, right = ends(decode.own_size(data, "image"))

    assert right == WHITE
    assert left == left[:1] * 3, "grey"


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_file_without_transparency_has_no_holes(form: str) -> None:
    data = saved(halves("RGB", (0, 0, 0), WHITE), form)

    assert ends(decode.mask(data, "alpha", "image")) == (0, 0)


def test_a_half_transparent_white_pixel_is_half_marked() -> None:
    data = saved(halves("RGBA", (*WHITE, 128), (128, 128, 128, 255)))

    assert ends(decode.mask(data, "luminance", "mask_image")) == (128, 128)


def test_a_cmyk_picture_keeps_its_colours() -> None:
    data = saved(halves("CMYK", (0, 255, 255, 0), (0, 0, 0, 0)), "JPEG", quality=100, subsampling=0)

    left, right = ends(decode.own_size(data, "image"))

    assert np.abs(np.subtract(left, RED)).max() <= 3
    assert np.abs(np.subtract(right, WHITE)).max() <= 3


@pytest.mark.parametrize("channel", ["luminance", "alpha"])
def test_the_largest_picture_with_alpha_fits_the_memory_of_its_process(channel: Any) -> None:
    data = saved(Image.new("RGBA", (4000, 4000), (*WHITE, 128)), compress_level=1)

    mask = decode.mask(data, channel, "mask_image")
    picture = decode.own_size(data, "image")

    assert (mask.size, picture.size) == ((4000, 4000), (4000, 4000))


QUARTERS = Image.new("L", (8, 6))
QUARTERS.putdata([0, 0, 0, 0, 60, 60, 60, 60] * 3 + [120, 120, 120, 120, 255, 255, 255, 255] * 3)
QUARTERS = QUARTERS.resize((64, 48), Image.Resampling.NEAREST)
STORED = {  # how an upright picture is stored, by EXIF orientation
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(("orientation", "turn"), STORED.items())
def test_pictures_and_masks_of_every_orientation_are_turned_upright(
    orientation: int, turn: Any, form: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    alpha = [] if form == "JPEG" else [Image.new("L", QUARTERS.size, 255)]
    upright = Image.merge("RGBA" if alpha else "RGB", [QUARTERS, QUARTERS, QUARTERS, *alpha])
    stored = upright if turn is None else upright.transpose(turn)
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(form, {})
    data = saved(stored, form, exif=exif, **options)

    picture, mask = decode.own_size(data, "image"), decode.mask(data, "luminance", "mask_image")

    assert picture.size == mask.size == (64, 48)
    for given in (picture.convert("L"), mask):
        assert np.abs(np.subtract(given, QUARTERS, dtype=np.int16)).max() <= 3
