"""Untrusted pictures are decoded in child processes that may die without harm to the caller."""

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

from deployments.protocol.errors import BadRequest
from deployments.sandbox.decoder import DecodeMode, DecoderPool

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
def decoder_pool() -> Iterator[DecoderPool]:
    decoder_pool = DecoderPool(processes=1)
    yield decoder_pool
    decoder_pool.close()


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_the_pixels_come_back_as_they_were(decoder_pool: DecoderPool, form: str) -> None:
    data = file() if form == "PNG" else _lossless_webp()

    picture = decoder_pool.decode(data, DecodeMode.picture, "image")

    assert (picture.mode, picture.size) == ("RGB", GRADIENT.size)
    assert picture.tobytes() == GRADIENT.tobytes()


def _lossless_webp() -> bytes:
    buffer = io.BytesIO()
    GRADIENT.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "size", [(16_000, 11_000), (20_000, 20_000)], ids=["a warning in Pillow", "an error"]
)
def test_a_decompression_bomb_ends_its_child_only(decoder_pool: DecoderPool, size: tuple[int, int]) -> None:
    data = bomb(*size)
    before = psutil.Process().memory_info().rss

    with pytest.raises(BadRequest, match="image is damaged"):
        decoder_pool.decode(data, DecodeMode.picture, "image")

    assert len(data) < 100_000
    assert psutil.Process().memory_info().rss - before < 64 * 2**20
    assert decoder_pool.decode(file(), DecodeMode.picture, "image").size == GRADIENT.size


@pytest.mark.parametrize("mode", list(DecodeMode))
@pytest.mark.parametrize(
    "data", [b"", b"GIF89a" + b"\0" * 99, file()[:100], file(form="JPEG")[:300], b"%PDF-1.7"]
)
def test_a_truncated_or_foreign_file_is_refused_and_the_child_goes_on(
    decoder_pool: DecoderPool, data: bytes, mode: DecodeMode
) -> None:
    decoder_pool.decode(file(), mode, "mask_image")
    warm = decoder_pool.pids

    with pytest.raises(BadRequest) as refusal:
        decoder_pool.decode(data, mode, "mask_image")

    assert refusal.value.param == "mask_image"
    assert decoder_pool.pids == warm


@pytest.mark.parametrize("form", ["TIFF", "GIF", "BMP", "ICO", "PPM", "TGA"])
def test_of_pillows_many_formats_three_are_opened(decoder_pool: DecoderPool, form: str) -> None:
    with pytest.raises(BadRequest, match="UnidentifiedImageError"):
        decoder_pool.decode(file(form=form), DecodeMode.picture, "image")


def test_a_child_that_died_idle_is_replaced(decoder_pool: DecoderPool) -> None:
    decoder_pool.decode(file(), DecodeMode.check, "image")
    (first,) = decoder_pool.pids
    psutil.Process(first).kill()

    assert _again(decoder_pool).size == GRADIENT.size
    assert decoder_pool.pids != [first]


def _again(decoder_pool: DecoderPool) -> Image.Image:
    """A picture from the next child; the end of the last one may show on its next use only."""
    try:
        return decoder_pool.decode(file(), DecodeMode.picture, "image")
    except BadRequest:
        return decoder_pool.decode(file(), DecodeMode.picture, "image")


@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="this system limits no memory")
def test_a_child_out_of_memory_fails_its_own_picture_only(decoder_pool: DecoderPool) -> None:
    decoder_pool.decode(file(), DecodeMode.check, "image")
    (pid,) = decoder_pool.pids
    psutil.Process(pid).rlimit(psutil.RLIMIT_AS, (1, 1))  # as if the picture had taken it all

    with pytest.raises(BadRequest, match=r"MemoryError|too much memory"):
        decoder_pool.decode(file(GRADIENT.resize((3000, 3000))), DecodeMode.picture, "image")

    assert _again(decoder_pool).size == GRADIENT.size
    assert decoder_pool.pids != [pid]


def test_a_child_that_never_answers_is_killed_at_the_timeout() -> None:
    decoder_pool = DecoderPool(processes=1, timeout_s=20.0)
    decoder_pool.decode(file(), DecodeMode.check, "image")
    (pid,) = decoder_pool.pids
    decoder_pool._timeout_s = 0.3
    os.kill(pid, signal.SIGSTOP)

    with pytest.raises(BadRequest, match="too much memory or time"):
        decoder_pool.decode(file(), DecodeMode.picture, "image")

    assert not psutil.pid_exists(pid)
    decoder_pool.close()


def test_a_child_has_no_secrets_and_can_open_no_file(decoder_pool: DecoderPool) -> None:
    decoder_pool.decode(file(), DecodeMode.check, "image")
    (pid,) = decoder_pool.pids
    child = psutil.Process(pid)

    assert child.environ() == {"LC_ALL": "C"}
    assert child.cwd() == "/"
    if hasattr(child, "rlimit"):
        assert child.rlimit(psutil.RLIMIT_NOFILE) == (3, 3)
        assert child.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
        assert 0 < child.rlimit(psutil.RLIMIT_AS)[1] < 4 * 2**30


def test_many_threads_share_few_children_and_each_gets_its_own_picture() -> None:
    decoder_pool = DecoderPool(processes=2)
    colours = [(n * 10, 255 - n * 10, n) for n in range(16)]

    with ThreadPoolExecutor(8) as threads:
        files = [file(Image.new("RGB", (40 + n, 32), colour)) for n, colour in enumerate(colours)]
        pictures = list(
            threads.map(lambda data: decoder_pool.decode(data, DecodeMode.picture, "image"), files)
        )

    assert [picture.getpixel((0, 0)) for picture in pictures] == colours
    assert [picture.width for picture in pictures] == [40 + n for n in range(16)]
    assert len(decoder_pool.pids) == 2
    decoder_pool.close()


def test_a_picture_that_is_also_an_archive_leaves_as_pixels_only(decoder_pool: DecoderPool) -> None:
    polyglot = file() + b"PK\x03\x04<script>alert(1)</script>"

    picture = decoder_pool.decode(polyglot, DecodeMode.picture, "image")

    assert b"<script>" not in file(picture)
    assert picture.tobytes() == GRADIENT.tobytes()
