"""The rotation that a picture file asks for, from its EXIF or XMP metadata."""

from __future__ import annotations

import re
import struct
import zlib

UPRIGHT = 1  # values are 1 to 8, as EXIF numbers them; from FIRST_QUARTER_TURN width and height are swapped
FIRST_QUARTER_TURN = 5
EXIF_PREFIX = b"Exif\0\0"  # before the TIFF structure: always in JPEG, sometimes in PNG and WebP
MAX_INFLATED_BYTES = 2**16  # of compressed metadata
_TAG = 0x0112
_MAX_ENTRIES = 256  # of the first directory; cameras write about 15
_VALUE = {3: "H", 4: "I", 8: "h", 9: "i"}  # integer types of TIFF of more than one byte
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


def exif_orientation(exif: bytes) -> int | None:
    """The orientation, 1 to 8, in an EXIF block; None where it has none or cannot be read.

    exif: a TIFF structure, with or without EXIF_PREFIX. Only the first directory is read, as the standard
    puts the tag there.
    """
    tiff = exif.removeprefix(EXIF_PREFIX).removeprefix(EXIF_PREFIX)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    found = None
    try:
        (at,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * min(count, _MAX_ENTRIES), 12):
            tag, kind, values = struct.unpack_from(f"{order}HHI", tiff, entry)
            if tag == _TAG and values == 1 and kind in _VALUE:
                (found,) = struct.unpack_from(order + _VALUE[kind], tiff, entry + 8)
    except struct.error:  # the directory is cut: what was read before counts
        pass
    return found if found in range(1, 9) else None


def xmp_orientation(xmp: bytes) -> int | None:
    """The orientation, 1 to 8, in an XMP packet; None where it has none."""
    match = _XMP.search(xmp)
    return None if match is None else int(match[1])


def profile_exif(text: bytes) -> bytes:
    """The EXIF block in the hexadecimal text that ImageMagick writes into PNG files; empty if unreadable.

    text: an empty line, the name, the length, then lines of digits.
    """
    try:
        return bytes.fromhex(text.split(b"\n", 3)[3][: 2 * MAX_INFLATED_BYTES].decode("ascii"))
    except (IndexError, ValueError):
        return b""


def inflated(data: bytes) -> bytes:
    """The first MAX_INFLATED_BYTES of zlib data; empty where it is broken."""
    try:
        return zlib.decompressobj().decompress(data, MAX_INFLATED_BYTES)
    except zlib.error:
        return b""
