"""Byte ranges of finished files: what a player asks for when it seeks in a video (pure)."""

from __future__ import annotations

import re
from dataclasses import dataclass

RANGE = re.compile(r"bytes=(\d{0,15})-(\d{0,15})")


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes start..end of a file, both included."""

    start: int
    end: int
    size: int  # of the whole file

    @property
    def content_range(self) -> str:
        return f"bytes {self.start}-{self.end}/{self.size}"


class RangeNotSatisfiable(Exception):
    """The range lies outside of the file."""


def requested_range(
    header: str | None, size: int, etag: str, if_range: str | None = None
) -> ByteRange | None:
    """The part that a Range header asks for; None: the whole file.

    Several ranges at once, other units and ranges of another version of the file are answered with the
    whole file, as RFC 9110 allows. Raises Unsatisfiable.
    """
    if header is None or (if_range is not None and if_range.strip() != etag):
        return None
    match = RANGE.fullmatch(header.strip().replace(" ", ""))
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":  # the last bytes
        length = min(int(match[2]), size)
        start, end = size - length, size - 1
    else:
        start, end = int(match[1]), min(int(match[2] or size), size - 1)
        if match[2] and int(match[2]) < start:
            return None
    if start >= size or end < start:
        raise RangeNotSatisfiable
    return ByteRange(start, end, size)
