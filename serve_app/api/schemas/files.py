"""Files inside JSON: base64 text or a data URL, validated to bytes."""

import base64
import binascii
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

PART_CHARS = 2**18
MAX_FILE_CHARS = 32 * 2**20  # of base64: 24 MiB


def _decode_image(value: Any) -> Any:
    """The bytes of base64 text or a data URL; any other type is left to pydantic. Raises ValueError."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise ValueError("a data URL must read data:image/png;base64,<data>")
    elif "://" in text[:40]:
        raise ValueError("this service fetches no addresses; send the picture itself as base64 or as a file")
    try:
        return _decode(text)
    except (binascii.Error, ValueError):
        raise ValueError(
            "this is not base64; send a PNG, JPEG or WebP file as base64 or a data URL"
        ) from None


def _decode_file(value: Any) -> Any:
    """The same for a safetensors file of at most MAX_FILE_CHARS."""
    if not isinstance(value, str):
        return value
    if len(value) > MAX_FILE_CHARS:
        raise ValueError("is over 24 MiB; register the adapter by upload, or send a url")
    try:
        return _decode(value.partition(",")[2] if value[:5].lower() == "data:" else value)
    except (binascii.Error, ValueError):
        raise ValueError("this is not base64; send the file as base64") from None


def _decode(text: str) -> bytes:
    """The bytes of base64 text, which may be in lines. Raises ValueError.

    Decoded in parts: each holds the interpreter's lock for a millisecond, not for a tenth of a second.
    """
    data, rest, ended = bytearray(), "", False
    for start in range(0, len(text), PART_CHARS):
        part = rest + "".join(text[start : start + PART_CHARS].split())
        if ended and part:
            raise ValueError("there is text after the padding")
        whole = len(part) // 4 * 4
        data += base64.b64decode(part[:whole], validate=True)
        rest, ended = part[whole:], part[:whole].endswith("=")
    if rest:
        raise ValueError("the last characters are missing")
    return bytes(data)


ImageBytes = Annotated[
    bytes,
    BeforeValidator(_decode_image),
    WithJsonSchema({"type": "string", "description": "PNG, JPEG or WebP: base64 or a data URL."}),
]


def _as_list(value: Any) -> Any:
    """A list of a single picture."""
    return [value] if isinstance(value, str | bytes) else value


ImageList = Annotated[list[ImageBytes], BeforeValidator(_as_list)]  # a single picture counts as a list of one
FileBytes = Annotated[
    bytes,
    BeforeValidator(_decode_file),
    WithJsonSchema({"type": "string", "description": "A safetensors file as base64, at most 24 MiB."}),
]
