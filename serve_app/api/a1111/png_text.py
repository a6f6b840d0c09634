"""Text in PNG files, where A1111 keeps the settings of an image (pure)."""

from __future__ import annotations

import struct

from deployments.validation.orientation import inflated

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER = struct.Struct(">I4s")
MAX_CHUNKS = 3072


def png_texts(data: bytes) -> dict[str, str]:
    """The text chunks by keyword, of compressed ones the beginning; empty for a file that is no PNG."""
    found: dict[str, str] = {}
    if not data.startswith(SIGNATURE):
        return found
    at = len(SIGNATURE)
    for _ in range(MAX_CHUNKS):
        if at + HEADER.size > len(data):
            break
        length, kind = HEADER.unpack_from(data, at)
        content = data[at + HEADER.size : at + HEADER.size + length]
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, _, rest = content.partition(b"\0")
            found.setdefault(keyword.decode("latin-1")[:100], _text(kind, rest))
        at += HEADER.size + length + 4  # past the checksum
    return found


def _text(kind: bytes, rest: bytes) -> str:
    """The text after a chunk's keyword."""
    if kind == b"tEXt":
        return rest.decode("latin-1")
    if kind == b"zTXt":
        return inflated(rest[1:]).decode("latin-1")
    text = rest[2:].partition(b"\0")[2].partition(b"\0")[2]  # past language and translated keyword
    found = inflated(text) if rest[:1] == b"\1" else text
    return found.decode("utf-8", "replace")
