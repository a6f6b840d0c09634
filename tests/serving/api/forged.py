"""Pictures, and files that pretend to be pictures."""

import io
import struct
import zipfile
import zlib

from PIL import Image


def png(width: int = 64, height: int = 64) -> bytes:
    return _saved("PNG", width, height)


def jpeg(width: int = 64, height: int = 64) -> bytes:
    return _saved("JPEG", width, height)


def webp(width: int = 64, height: int = 64) -> bytes:
    return _saved("WEBP", width, height)


def _saved(format_name: str, width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.radial_gradient("L").resize((width, height)).convert("RGB").save(file, format_name)
    return file.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _bomb(width: int, height: int) -> bytes:
    """A tiny file of one colour that decodes to width x height pixels."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    row = b"\0" * (1 + (width + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("fox.png", png())
    return file.getvalue()


def _gif() -> bytes:
    file = io.BytesIO()
    Image.new("P", (64, 64)).save(file, "GIF")
    return file.getvalue()


BAD = {
    "empty": b"",
    "text": b"hello, this is no picture at all",
    "png header and junk": png()[:60] + b"\xde\xad\xbe\xef" * 200,
    "png cut in half": png()[: len(png()) // 2],
    "png signature alone": b"\x89PNG\r\n\x1a\n",
    "png with a lying chunk": png()[:33] + struct.pack(">I", 2**31) + b"IDAT" + b"\0" * 50,
    "png bomb of 20000x20000": _bomb(20_000, 20_000),
    "png bomb of 9000x9000": _bomb(9_000, 9_000),
    "png of one pixel": png(1, 1),
    "jpeg cut in half": jpeg()[: len(jpeg()) // 2],
    "webp cut in half": webp()[: len(webp()) // 2],
    "webp header alone": webp()[:20],
    "gif": _gif(),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "zip": _zip(),
    "html": b"<!doctype html><img src=x onerror=alert(1)>",
}
