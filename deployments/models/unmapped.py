"""Reading the shards of a module without keeping all of them mapped.

transformers 5 maps all files of a module until it is loaded, so the resident memory of the host grows to all
of them. Here each tensor has a mapping of its own, which ends when the tensor has been copied. (`pread`, the
other way that safetensors has, takes three times as long.) diffusers maps one file at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from transformers import modeling_utils

_own = threading.local()  # `unmapped` of a thread inside the block


@dataclass(eq=False, slots=True)
class _File:
    """In place of an open file: its tensors as `safe_open` gives them, opened anew for each."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def keys(self) -> list[str]:
        with safe_open(*self.arguments, **self.options) as file:
            return list(file.keys())

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self, name)

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


@dataclass(frozen=True, slots=True)
class _Slice:
    file: _File
    name: str

    def __getitem__(self, index: Any) -> Any:
        """A tensor over a mapping of the file, which ends with the tensor."""
        with safe_open(*self.file.arguments, **self.file.options) as file:
            return file.get_slice(self.name)[index]

    def get_shape(self) -> list[int]:
        return list(self._header().get_shape())

    def get_dtype(self) -> str:
        return str(self._header().get_dtype())

    def _header(self) -> Any:
        with safe_open(*self.file.arguments, **self.file.options) as file:
            return file.get_slice(self.name)


def _safe_open(*arguments: Any, **options: Any) -> Any:
    return _File(arguments, options) if getattr(_own, "unmapped", False) else safe_open(*arguments, **options)


@contextmanager
def unmapped() -> Iterator[None]:
    """In the block, transformers keeps no file of the current thread's modules mapped."""
    libraries: Any = modeling_utils
    libraries.safe_open = _safe_open  # stays: it does the same outside of blocks
    _own.unmapped = True
    try:
        yield
    finally:
        del _own.unmapped
