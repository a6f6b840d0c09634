"""Headers of pictures: as Pillow reads them where they are sound, refused in bounded work elsewhere."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from deployments.media import decode
from deployments.protocol.errors import BadRequest, TooLarge
from deployments.validation import image_formats
from deployments.validation.image_header import MAX_FILE_BYTES, ImageHeader, read_image_header

RED, BLUE = (255, 0, 0), (0, 0, 255)
SIGNATURE = b"\x89PNG\r\n\x1a\n"
ORIENTATION = 0x0112
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'
MIB = 2**20


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def ihdr(width: int = 32, height: int = 24, *, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def png(*before: bytes, after: bytes = b"", header: bytes | None = None) -> bytes:
    """Red above blue, 32x24, with these chunks before and after the pixels."""
    rows = b"".join(b"\0" + bytes(RED if y < 12 else BLUE) * 32 for y in range(24))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return SIGNATURE + (header or ihdr()) + b"".join(before) + pixels + after + chunk(b"IEND")


def exif(orientation: int, order: str = ">") -> bytes:
    """A TIFF structure of one tag."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}IHHHIHHI", 8, 1, ORIENTATION, 3, 1, orientation, 0, 0)


def text(kind: bytes, keyword: bytes, value: bytes) -> bytes:
    if kind == b"iTXt":
        return chunk(kind, keyword + b"\0\0\0\0\0" + value)
    return chunk(kind, keyword + b"\0" + (b"\0" + zlib.compress(value) if kind == b"zTXt" else value))


def profile(orientation: int) -> bytes:
    """EXIF as ImageMagick writes it into PNG files."""
    block = b"Exif\0\0" + exif(orientation)
    return b"\nexif\n%8d\n%s\n" % (len(block), block.hex().encode())


def saved(form: str, size: tuple[int, int] = (32, 24), mode: str = "RGB", **options: object) -> bytes:
    picture = Image.new("RGB", size, RED)
    picture.paste(BLUE, (0, size[1] // 2, *size))
    buffer = io.BytesIO()
    picture.convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def with_segments(*segments: bytes) -> bytes:
    jpeg = saved("JPEG")
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(
        kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def extended_webp(*chunks: tuple[bytes, bytes], flags: int) -> bytes:
    simple = saved("WEBP")
    canvas = bytes((flags, 0, 0, 0)) + (31).to_bytes(3, "little") + (23).to_bytes(3, "little")
    return riff((b"VP8X", canvas), (b"VP8 ", simple[20:]), *chunks)


def as_pillow(data: bytes) -> ImageHeader:
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        form = "JPEG" if picture.format == "MPO" else str(picture.format)
        return ImageHeader(form, *picture.size, picture.getexif().get(ORIENTATION, 1))


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(["PNG", "JPEG", "WEBP"]),
    mode=st.sampled_from(["RGB", "L", "RGBA", "P", "1", "CMYK", "LA", "I;16"]),
    size=st.tuples(st.integers(16, 300), st.integers(16, 300)),
    orientation=st.none() | st.integers(1, 8),
    icc=st.booleans(),
    progressive=st.booleans(),
    lossless=st.booleans(),
    note=st.text(max_size=30),
)
def test_a_sound_picture_is_read_as_pillow_reads_it(
    form: str,
    mode: str,
    size: tuple[int, int],
    orientation: int | None,
    icc: bool,
    progressive: bool,
    lossless: bool,
    note: str,
) -> None:
    allowed = {"PNG": ("RGB", "L", "RGBA", "P", "1", "LA", "I;16"), "JPEG": ("RGB", "L", "CMYK")}
    mode = mode if mode in allowed.get(form, ("RGB", "RGBA")) else "RGB"
    info = PngInfo()
    info.add_itxt("parameters", note)
    options: dict[str, object] = {"progressive": progressive, "lossless": lossless, "pnginfo": info}
    if orientation is not None:
        tags = Image.Exif()
        tags[ORIENTATION] = orientation
        options["exif"] = tags
    if icc:
        options["icc_profile"] = bytes(range(256)) * 300
    data = saved(form, size, mode, **options)

    assert read_image_header(data, "image") == as_pillow(data)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "build",
    [
        lambda o: png(chunk(b"eXIf", exif(o))),
        lambda o: png(chunk(b"eXIf", exif(o, "<"))),
        lambda o: png(after=chunk(b"eXIf", exif(o))),
        lambda o: png(text(b"tEXt", b"Raw profile type exif", profile(o))),
        lambda o: png(text(b"zTXt", b"Raw profile type exif", profile(o))),
        lambda o: png(text(b"iTXt", b"XML:com.adobe.xmp", XMP % o)),
        lambda o: with_segments(segment(0xE1, b"Exif\0\0" + exif(o))),
        lambda o: with_segments(segment(0xE1, b"Exif\0\0" + exif(o, "<"))),
        lambda o: with_segments(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP % o)),
        lambda o: with_segments(segment(0xE2, b"x" * 60_000), segment(0xE1, b"Exif\0\0" + exif(o))),
        lambda o: extended_webp((b"EXIF", exif(o)), flags=0x08),
        lambda o: extended_webp((b"EXIF", b"Exif\0\0" + exif(o)), flags=0x08),
        lambda o: extended_webp((b"XMP ", XMP % o), flags=0x04),
    ],
    ids=[
        "png", "png, little endian", "png, after the pixels", "png, ImageMagick", "png, compressed",
        "png, xmp",
        "jpeg", "jpeg, little endian", "jpeg, xmp", "jpeg, after a profile",
        "webp", "webp, with a prefix", "webp, xmp",
    ],
)  # fmt: skip
def test_a_turned_picture_comes_out_upright_wherever_its_orientation_stands(
    build: Callable[[int], bytes], orientation: int
) -> None:
    data = build(orientation)
    with Image.open(io.BytesIO(data)) as picture:
        upright = ImageOps.exif_transpose(picture).convert("RGB")

    header = read_image_header(data, "image")
    decoded = decode.own_size(data, "image")

    assert header == as_pillow(data)
    assert header.orientation == orientation
    assert header.upright_size == upright.size == decoded.size
    assert decoded.tobytes() == upright.tobytes()


@pytest.mark.parametrize(
    "data",
    [
        with_segments(segment(0xE1, b"Exif\0\0" + b"not a TIFF structure")),
        with_segments(segment(0xE1, b"Exif\0\0" + exif(9))),
        with_segments(segment(0xE1, b"Exif\0\0" + exif(6)[:-8])),
        with_segments(segment(0xE1, b"Exif\0\0" + b"MM\0*\xff\xff\xff\xff")),
        with_segments(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0tiff:Orientation=9")),
        png(chunk(b"eXIf", b"")),
        png(text(b"zTXt", b"Raw profile type exif", b"\nexif\n9\nno digits\n")),
        png(chunk(b"zTXt", b"Raw profile type exif\0\0no zlib data")),
        extended_webp((b"EXIF", exif(6)), flags=0),  # a chunk that the file does not announce is not read
    ],
)
def test_an_orientation_that_cannot_be_read_leaves_the_picture_as_it_is_stored(data: bytes) -> None:
    header = read_image_header(data, "image")

    assert header.orientation == 1
    assert decode.own_size(data, "image").size == (32, 24)


@pytest.mark.parametrize(
    "data",
    [
        with_segments(segment(0xFE, b"a comment"), b"junk between", b"\xff" * 40),
        saved("PNG", interlace=1),
        png(header=ihdr(interlace=0), after=chunk(b"tEXt", b"parameters\0a fox")),
        saved("PNG", save_all=True, append_images=[Image.new("RGB", (32, 24), BLUE)]),
        saved("WEBP", save_all=True, append_images=[Image.new("RGB", (32, 24), BLUE)], duration=100),
    ],
    ids=["junk", "interlaced", "text after the pixels", "animated png", "animated webp"],
)
def test_unusual_but_sound_files_are_read(data: bytes) -> None:
    header = read_image_header(data, "image")

    assert (header.width, header.height) == (32, 24)


HOSTILE = {
    "a million chunks": png(chunk(b"tEXt", b"k\0") * 200_000),
    "a million empty pixel chunks": png(chunk(b"IDAT") * 200_000),
    "a million chunks after the pixels": png(after=chunk(b"tEXt", b"k\0") * 200_000),
    "19 MiB of one text": png(chunk(b"tEXt", b"k\0" + b"x" * 19 * MIB)),
    "a chain of APP13": with_segments(segment(0xED, b"Photoshop 3.0\0") * 200_000),
    "a chain of full segments": with_segments(segment(0xE2, b"x" * 65_000) * 300),
    "19 MiB of escaped bytes": b"\xff\xd8\xff" + b"\x00\xff" * 9 * MIB,
    "19 MiB between two segments": b"\xff\xd8\xff\x00" + b"\x00" * 19 * MIB,
    "a million WebP chunks": extended_webp(*[(b"abcd", b"")] * 200_000, flags=0x08),
    "19 MiB of EXIF": extended_webp((b"EXIF", b"x" * 19 * MIB), flags=0x08),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_of_far_more_parts_or_metadata_than_any_camera_writes_is_refused(name: str) -> None:
    data = HOSTILE[name]
    assert len(data) < MAX_FILE_BYTES

    with pytest.raises(BadRequest, match="not a readable picture") as refusal:
        read_image_header(data, "image")

    assert "save it anew" in refusal.value.message
    assert refusal.value.param == "image"


@pytest.mark.parametrize("name", HOSTILE)
def test_the_work_for_a_hostile_file_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: no more steps than MAX_CHUNKS, each further on in the file."""
    offsets: list[int] = []

    def counting(walk: Callable[[bytes], object]) -> Callable[[bytes], object]:
        def walked(data: bytes):
            for part in walk(data):  # type: ignore[attr-defined]
                offsets.append(part[2])
                yield part

        return walked

    for walk in ("_png_chunks", "_jpeg_segments"):
        monkeypatch.setattr(image_formats, walk, counting(getattr(image_formats, walk)))

    with pytest.raises(BadRequest):
        read_image_header(HOSTILE[name], "image")

    assert len(offsets) <= image_formats.MAX_CHUNKS
    assert all(later > earlier for earlier, later in pairwise(offsets))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        SIGNATURE,
        SIGNATURE + ihdr(),
        png()[:40],
        png(header=ihdr(0, 24)),
        png(header=ihdr(depth=3)),
        png(header=ihdr(colour=5)),
        SIGNATURE + chunk(b"tEXt", b"k\0v") + png()[8:],
        SIGNATURE + ihdr() + chunk(b"IEND"),
        SIGNATURE + ihdr() + struct.pack(">I4s", 2**31 + 5, b"tEXt") + b"x" * 50,
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xd9",
        saved("JPEG")[:100],
        with_segments(segment(0xC0, b"\x08" + b"\0" * 9)),
        with_segments(b"\xff\xe1\x00\x01"),
        b"\xff\xd8" + b"\xff" * 19 * MIB,
        png(text(b"tEXt", b"k", b"v"))[:-60],
        saved("JPEG").replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
        saved("WEBP")[:29],
        saved("WEBP")[:60],
        riff((b"VP8 ", b"\0" * 40)),
        riff((b"VP8L", b"\0" * 40)),
        riff((b"JUNK", b"\0" * 40)),
    ],
)
def test_broken_headers_are_refused_with_the_fields_name(data: bytes) -> None:
    with pytest.raises(BadRequest, match="mask_image") as refusal:
        read_image_header(data, "mask_image")

    assert refusal.value.param == "mask_image"


@pytest.mark.parametrize(
    ("start", "named"),
    [
        (b"GIF89a", "a GIF"),
        (b"\0\0\0\x1cftypheic", "a HEIC"),
        (b"\0\0\0\x1cftypavif", "an AVIF"),
        (b"BM", "a BMP"),
        (b"II*\0", "a TIFF"),
        (b"%PDF-1.7", "a PDF"),
        (b"<svg xmlns", "an SVG"),
    ],
)
def test_another_format_is_named(start: bytes, named: str) -> None:
    with pytest.raises(BadRequest, match=f"it is {named} file.*; send a PNG, JPEG or WebP file"):
        read_image_header(start + b"\0" * 100, "image")


@pytest.mark.parametrize("data", [png(header=ihdr(5000, 4000)), riff((b"VP8X", b"\0" * 4 + b"\xff" * 6))])
def test_a_size_over_the_limit_is_refused_before_anything_is_allocated(data: bytes) -> None:
    with pytest.raises(TooLarge, match="megapixels"):
        read_image_header(data, "image")


@settings(max_examples=200, deadline=None)
@given(
    base=st.sampled_from([png(chunk(b"eXIf", exif(6))), with_segments(segment(0xE1, b"Exif\0\0" + exif(6))),
                          extended_webp((b"EXIF", exif(6)), flags=0x08), saved("WEBP", lossless=True)]),
    changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 400),
)  # fmt: skip
def test_a_mutated_file_is_read_or_refused_and_never_crashes(
    base: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(base[: len(base) - cut] if cut < 200 else base)
    for at, value in changes:
        if at < len(data):
            data[at] = value

    try:
        header = read_image_header(bytes(data), "image")
    except (BadRequest, TooLarge):
        return
    assert header.orientation in range(1, 9)
    assert min(header[1:3]) >= 16
