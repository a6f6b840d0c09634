"""Which line of our code or of a library made the device do something."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import NamedTuple

PACKAGES = ("deployments", "diffusers", "transformers", "torchao")


class Source(NamedTuple):
    """A place in the code. Without the line it is the same in all versions of a library."""

    file: str  # from the package on, such as deployments/engine/stacking.py
    function: str
    line: int

    @property
    def is_ours(self) -> bool:
        return self.file.startswith("deployments/")

    def __str__(self) -> str:
        return f"{self.file}:{self.function}"


UNKNOWN = Source("?", "?", 0)
_files: dict[CodeType, str] = {}  # "" for code of other packages


def innermost() -> Source:
    """The innermost line of PACKAGES that is running."""
    return next(_running(sys._getframe(1)), UNKNOWN)


def innermost_of_ours() -> Source:
    """The innermost line of deployments/ that is running; its callees may be a library's."""
    return next((source for source in _running(sys._getframe(1)) if source.is_ours), UNKNOWN)


def is_running(functions: frozenset[str]) -> bool:
    """Whether a function of deployments/ with one of these names is running."""
    return any(source.is_ours and source.function in functions for source in _running(sys._getframe(1)))


def package_of(source: Source) -> str:
    """What a kernel is counted under: our packages, such as deployments/loras; a library by its name."""
    parts = source.file.split("/")
    return "/".join(parts[:2]) if source.is_ours else parts[0]


def _running(frame: FrameType | None) -> Iterator[Source]:
    while frame is not None:
        code = frame.f_code
        file = _files.get(code)
        if file is None:
            file = _files[code] = _short(code.co_filename)
        if file:
            yield Source(file, code.co_name, frame.f_lineno)
        frame = frame.f_back


def _short(path: str) -> str:
    """The path from its package on; "" for a file of another package."""
    for package in PACKAGES:
        start = path.find(f"/site-packages/{package}/")
        if start >= 0:
            return path[start + len("/site-packages/") :]
    start = path.rfind("/deployments/")
    return path[start + 1 :] if start >= 0 else ""
