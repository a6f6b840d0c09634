"""Reading the shards of a module without mapping them.

transformers 5 maps all files of a module at once until it is loaded, so the resident memory of the host grows
to all of them. Read by `pread`, a tensor is in memory until it is copied. diffusers maps one file at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import safe_open
from transformers import modeling_utils

_own = threading.local()  # `unmapped` of a thread inside the block


def _safe_open(*arguments: Any, **options: Any) -> Any:
    if getattr(_own, "unmapped", False):
        options["backend"] = "pread"
    return safe_open(*arguments, **options)


@contextmanager
def unmapped() -> Iterator[None]:
    """In the block, transformers reads files of the current thread's modules by `pread`."""
    libraries: Any = modeling_utils
    libraries.safe_open = _safe_open  # stays: it does the same outside of blocks
    _own.unmapped = True
    try:
        yield
    finally:
        del _own.unmapped
