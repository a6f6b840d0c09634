"""Untrusted pictures are decoded in programs that may die; the process that asked lives."""

from __future__ import annotations

import io
import os
import signal
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from PIL import Image

from deployments.protocol.decoding import Decoders, Kind
from deployments.protocol.errors import BadRequest

GRADIENT = Image.linear_gradient("L").resize((64, 48)).convert("RGB")


def file(picture: Image.Image = GRADIENT, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel, all black: a few kilobytes that become hundreds of megabytes."""
    packer = zlib.compressobj(9)
    row = b"\0" * (1 + (width + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    decoders = Decoders(processes=1)
    yield decoders
    decoders.close()


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_the_pixels_come_back_as_they_were(decoders: Decoders, form: str) -> None:
    data = file() if form == "PNG" else _lossless_webp()

    picture = decoders.decode(data, Kind.picture, "image")

    assert (picture.mode, picture.size) == ("RGB", GRADIENT.size)
    assert picture.tobytes() == GRADIENT.tobytes()


def _lossless_webp() -> bytes:
    buffer = io.BytesIO()
    GRADIENT.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "size", [(16_000, 11_000), (20_000, 20_000)], ids=["a warning in Pillow", "an error"]
)
def test_a_bomb_costs_its_program_not_us(decoders: Decoders, size: tuple[int, int]) -> None:
    data = bomb(*size)
    before = psutil.Process().memory_info().rss

    with pytest.raises(BadRequest, match="image is damaged"):
        decoders.decode(data, Kind.picture, "image")

    assert len(data) < 100_000
    assert psutil.Process().memory_info().rss - before < 64 * 2**20
    assert decoders.decode(file(), Kind.picture, "image").size == GRADIENT.size


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize(
    "data", [b"", b"GIF89a" + b"\0" * 99, file()[:100], file(form="JPEG")[:300], b"%PDF-1.7"]
)
def test_what_is_no_whole_picture_is_refused_and_the_program_goes_on(
    decoders: Decoders, data: bytes, kind: Kind
) -> None:
    decoders.decode(file(), kind, "mask_image")
    warm = decoders.pids

    with pytest.raises(BadRequest) as refusal:
        decoders.decode(data, kind, "mask_image")

    assert refusal.value.param == "mask_image"
    assert decoders.pids == warm


@pytest.mark.parametrize("form", ["TIFF", "GIF", "BMP", "ICO", "PPM", "TGA"])
def test_of_pillows_many_formats_three_are_opened(decoders: Decoders, form: str) -> None:
    with pytest.raises(BadRequest, match="UnidentifiedImageError"):
        decoders.decode(file(form=form), Kind.picture, "image")


def test_a_program_that_died_idle_is_replaced(decoders: Decoders) -> None:
    decoders.decode(file(), Kind.check, "image")
    (first,) = decoders.pids
    psutil.Process(first).kill()

    assert _again(decoders).size == GRADIENT.size
    assert decoders.pids != [first]


def _again(decoders: Decoders) -> Image.Image:
    """A picture from the next program; that the last one ended may show only when it is asked."""
    try:
        return decoders.decode(file(), Kind.picture, "image")
    except BadRequest:
        return decoders.decode(file(), Kind.picture, "image")


@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="this system limits no memory")
def test_a_program_out_of_memory_fails_its_own_picture_alone(decoders: Decoders) -> None:
    decoders.decode(file(), Kind.check, "image")
    (pid,) = decoders.pids
    psutil.Process(pid).rlimit(psutil.RLIMIT_AS, (1, 1))  # as if the picture had taken it all

    with pytest.raises(BadRequest, match=r"MemoryError|too much memory"):
        decoders.decode(file(GRADIENT.resize((3000, 3000))), Kind.picture, "image")

    assert _again(decoders).size == GRADIENT.size
    assert decoders.pids != [pid]


def test_a_program_that_never_answers_is_ended_at_the_limit() -> None:
    decoders = Decoders(processes=1, limit_s=20.0)
    decoders.decode(file(), Kind.check, "image")
    (pid,) = decoders.pids
    decoders._limit_s = 0.3
    os.kill(pid, signal.SIGSTOP)

    with pytest.raises(BadRequest, match="too much memory or time"):
        decoders.decode(file(), Kind.picture, "image")

    assert not psutil.pid_exists(pid)
    decoders.close()


def test_a_program_has_none_of_our_secrets_and_can_open_nothing(decoders: Decoders) -> None:
    decoders.decode(file(), Kind.check, "image")
    (pid,) = decoders.pids
    child = psutil.Process(pid)

    assert child.environ() == {"LC_ALL": "C"}
    assert child.cwd() == "/"
    if hasattr(child, "rlimit"):
        assert child.rlimit(psutil.RLIMIT_NOFILE) == (3, 3)
        assert child.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
        assert 0 < child.rlimit(psutil.RLIMIT_AS)[1] < 4 * 2**30


def test_many_threads_share_few_programs_and_everybody_gets_their_own_picture() -> None:
    decoders = Decoders(processes=2)
    colours = [(n * 10, 255 - n * 10, n) for n in range(16)]

    with ThreadPoolExecutor(8) as threads:
        files = [file(Image.new("RGB", (40 + n, 32), colour)) for n, colour in enumerate(colours)]
        pictures = list(threads.map(lambda data: decoders.decode(data, Kind.picture, "image"), files))

    assert [picture.getpixel((0, 0)) for picture in pictures] == colours
    assert [picture.width for picture in pictures] == [40 + n for n in range(16)]
    assert len(decoders.pids) == 2
    decoders.close()


def test_a_picture_that_is_also_an_archive_leaves_as_pixels_only(decoders: Decoders) -> None:
    polyglot = file() + b"PK\x03\x04<script>alert(1)</script>"

    picture = decoders.decode(polyglot, Kind.picture, "image")

    assert b"<script>" not in file(picture)
    assert picture.tobytes() == GRADIENT.tobytes()
