"""Size and orientation in the headers of PNG, JPEG and WebP files, read in bounded time.

Pillow takes 4.5 us for every chunk of a PNG and accepts any number of them: 24 s for one file of 19.5 MB.
Here the number of chunks and the bytes of metadata are limited; no function takes more than about 1 ms.
Whether the pixels can be decoded is found out in the sandbox.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from deployments.validation.orientation import (
    EXIF_PREFIX,
    UPRIGHT,
    exif_orientation,
    inflated,
    profile_exif,
    xmp_orientation,
)

MAX_METADATA_BYTES = 2**20  # everything in a file that is not picture data
MAX_CHUNKS = 3072  # of PNG and WebP, picture data included: libpng writes 8 KiB a chunk, so 20 MiB in 2,560
MAX_METADATA_PARTS = 512  # chunks without picture data; segments of JPEG before it (a profile of 1 MiB is 16)
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type
_PNG_CHUNK = struct.Struct(">I4s")
_PNG_DATA = (b"IDAT", b"fdAT")
_XMP_KEYWORD = b"XML:com.adobe.xmp"
_EXIF_KEYWORD = b"Raw profile type exif"
_JPEG_MARKER = re.compile(rb"\xff{1,64}([^\xff])", re.DOTALL)  # after fill bytes, of which a few are allowed
_JPEG_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_SOS, _JPEG_APP1 = 0xDA, 0xE1
_JPEG_BARE = frozenset((0x00, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)))  # markers without a length
_JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_WEBP_CHUNK = struct.Struct("<4sI")
_WEBP_DATA = (b"VP8 ", b"VP8L", b"ALPH", b"ANMF")
_WEBP_EXIF, _WEBP_XMP = 0x08, 0x04  # flags of VP8X


class StoredImage(NamedTuple):
    """A picture as it lies in the file, before it is turned upright."""

    width: int  # pixels
    height: int
    orientation: int  # 1 to 8, as EXIF numbers them


class BadHeader(ValueError):
    """The file cannot be read; the message is a clause about it, such as "it is truncated"."""


class TooMuchMetadata(BadHeader):
    """A sound file may be like this, but none that a camera or a program for pictures writes."""

    def __init__(self, what: str) -> None:
        super().__init__(f"it has {what}; save it anew without its metadata")


class _Budget:
    """What a file may still hold beside its picture data."""

    def __init__(self) -> None:
        self._parts, self._bytes = MAX_METADATA_PARTS, MAX_METADATA_BYTES

    def spend(self, size_bytes: int) -> None:
        """Count one chunk. Raises TooMuchMetadata."""
        self._parts -= 1
        self._bytes -= size_bytes
        if self._bytes < 0:
            raise TooMuchMetadata(f"over {MAX_METADATA_BYTES} bytes of metadata")
        if self._parts < 0:
            raise TooMuchMetadata(f"more than {MAX_METADATA_PARTS} chunks of metadata")


def read_png(data: bytes) -> StoredImage:
    """Size and orientation of a PNG file. Raises BadHeader."""
    if len(data) < 33 or data[8:16] != b"\0\0\0\rIHDR":
        raise BadHeader("its first chunk is no IHDR")
    width, height, depth, colour, method, filtering, interlace = struct.unpack_from(">IIBBBBB", data, 16)
    if depth not in _PNG_DEPTHS.get(colour, ()) or method or filtering or interlace > 1:
        raise BadHeader("its IHDR names a form of PNG that does not exist")
    found = _png_metadata(data)
    exif = found.get(b"eXIf") or profile_exif(found.get(_EXIF_KEYWORD, b""))
    return StoredImage(width, height, _orientation(exif, found.get(_XMP_KEYWORD, b"")))


def read_jpeg(data: bytes) -> StoredImage:
    """Size and orientation of a JPEG file. Raises BadHeader."""
    size, exif, xmp = None, b"", b""
    for marker, start, end in _jpeg_segments(data):
        if marker in _JPEG_SOF:
            if size is not None or end - start < 6 or data[start] != 8:
                raise BadHeader("it has no single frame of 8 bits a colour")
            height, width = struct.unpack_from(">HH", data, start + 1)
            size = width, height
        elif marker == _JPEG_APP1 and data.startswith(EXIF_PREFIX, start):
            exif += data[start + len(EXIF_PREFIX) if exif else start : end]  # a second segment continues it
        elif marker == _JPEG_APP1 and data.startswith(_JPEG_XMP, start):
            xmp = data[start:end]
    if size is None:
        raise BadHeader("its size is missing")
    return StoredImage(*size, _orientation(exif, xmp))


def read_webp(data: bytes) -> StoredImage:
    """Size and orientation of a WebP file. Raises BadHeader."""
    if len(data) < 30 or int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise BadHeader("it is truncated")
    first = data[12:16]
    if first == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return StoredImage(width & 0x3FFF, height & 0x3FFF, UPRIGHT)
    if first == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return StoredImage((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, UPRIGHT)
    if first != b"VP8X":
        raise BadHeader("its first chunk is no picture")
    width = int.from_bytes(data[24:27], "little") + 1
    height = int.from_bytes(data[27:30], "little") + 1
    metadata = _webp_metadata(data)
    exif = metadata.get(b"EXIF", b"") if data[20] & _WEBP_EXIF else b""
    xmp = metadata.get(b"XMP ", b"") if data[20] & _WEBP_XMP else b""
    return StoredImage(width, height, _orientation(exif, xmp))


def _orientation(exif: bytes, xmp: bytes) -> int:
    """EXIF before XMP, as Pillow and exiftool have it."""
    found = exif_orientation(exif) or xmp_orientation(xmp)
    return UPRIGHT if found is None else found


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and end of the content of every chunk after IHDR, up to IEND or where the file is cut."""
    at, size, has_pixels = 33, len(data), False
    for _ in range(MAX_CHUNKS):
        if at + 8 > size:
            return
        length, kind = _PNG_CHUNK.unpack_from(data, at)
        end = at + 8 + length
        if kind == b"IEND":
            return
        has_pixels = has_pixels or kind in _PNG_DATA
        if not has_pixels and (end > size or not kind.isalpha()):
            raise BadHeader("it is truncated, or broken before its picture data")
        yield kind, at + 8, min(end, size)
        at = end + 4  # past the checksum
    raise TooMuchMetadata(f"more than {MAX_CHUNKS} chunks")


def _png_metadata(data: bytes) -> dict[bytes, bytes]:
    """The first eXIf chunk by its type, and the first text of both keywords that programs keep EXIF and XMP
    under.
    """
    found: dict[bytes, tuple[bytes, int, int]] = {}
    budget, has_pixels = _Budget(), False
    for kind, start, end in _png_chunks(data):
        if kind in _PNG_DATA:
            has_pixels = True
            continue
        budget.spend(end - start)
        if kind == b"eXIf":
            found.setdefault(kind, (kind, start, end))
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            for keyword in (_EXIF_KEYWORD, _XMP_KEYWORD):
                if data.startswith(keyword + b"\0", start):
                    found.setdefault(keyword, (kind, start + len(keyword) + 1, end))
    if not has_pixels:
        raise BadHeader("it has no picture data")
    return {name: _png_text(kind, data[start:end]) for name, (kind, start, end) in found.items()}


def _png_text(kind: bytes, content: bytes) -> bytes:
    """The text of a chunk after its keyword, of compressed ones the beginning; eXIf as it is."""
    if kind == b"zTXt":
        return inflated(content[1:])
    if kind != b"iTXt":
        return content
    text = content[2:].partition(b"\0")[2].partition(b"\0")[2]  # past language and translated keyword
    return inflated(text) if content[:1] == b"\1" else text


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of the content of every segment before the picture data."""
    at, limit = 2, min(len(data), MAX_METADATA_BYTES)
    for _ in range(MAX_METADATA_PARTS):
        at = data.find(b"\xff", at, limit)  # decoders skip what lies between two segments
        if at < 0:
            break
        match = _JPEG_MARKER.match(data, at)
        if match is None:
            raise BadHeader("it is truncated, or broken before its picture data")
        marker, at = match[1][0], match.end()
        if marker == _JPEG_SOS:
            return
        if marker in _JPEG_BARE:
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        if length < 2 or at + length > len(data):
            raise BadHeader("it is truncated, or broken before its picture data")
        yield marker, at + 2, at + length
        at += length
    else:
        raise TooMuchMetadata(f"more than {MAX_METADATA_PARTS} segments before its picture data")
    if limit < len(data):
        raise TooMuchMetadata(f"over {MAX_METADATA_BYTES} bytes before its picture data")
    raise BadHeader("it has no picture data")


def _webp_metadata(data: bytes) -> dict[bytes, bytes]:
    """The first chunk of every type that holds no pixels, by type. Raises TooMuchMetadata."""
    found: dict[bytes, bytes] = {}
    at, end = 12, int.from_bytes(data[4:8], "little") + 8
    budget = _Budget()
    for _ in range(MAX_CHUNKS):
        if at + 8 > end:
            return found
        kind, length = _WEBP_CHUNK.unpack_from(data, at)
        if kind not in _WEBP_DATA:
            budget.spend(length)
            found.setdefault(kind, data[at + 8 : at + 8 + length])
        at += 8 + length + length % 2
    raise TooMuchMetadata(f"more than {MAX_CHUNKS} chunks")
