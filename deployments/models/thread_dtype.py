"""A default dtype for one thread: weights are loaded in their own dtype while other threads compute.

diffusers 0.42 and transformers 5 build a model between two calls of torch.set_default_dtype, which sets it
for every thread of the process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# functions whose result has the default dtype unless they are given another
BY_DEFAULT = frozenset(
    {
        torch.empty,
        torch.empty_strided,
        torch.eye,
        torch.linspace,
        torch.logspace,
        torch.ones,
        torch.rand,
        torch.randn,
        torch.zeros,
    }
)
# functions whose result has it if a number among their arguments is a float
BY_VALUE = frozenset({torch.arange, torch.full, torch.scalar_tensor, torch.tensor})

_set_for_all, _get_for_all = torch.set_default_dtype, torch.get_default_dtype  # outside of blocks
_own = threading.local()  # `mode` of a thread inside the block
_lock = threading.Lock()
_blocks = 0  # that run, in all threads


class _DefaultDtype(TorchFunctionMode):
    """Gives new tensors of the current thread a dtype; None: torch's own default."""

    dtype: torch.dtype | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.dtype is None or kwargs.get("dtype") is not None:
            return func(*args, **kwargs)
        if func in BY_DEFAULT:
            return func(*args, **(kwargs | {"dtype": self.dtype}))
        result = func(*args, **kwargs)
        if func in BY_VALUE and isinstance(result, Tensor) and result.dtype is _get_for_all():
            return result.to(self.dtype)
        return result


@contextmanager
def thread_default_dtype() -> Iterator[None]:
    """Inside the block, torch.set_default_dtype and get_default_dtype act on the current thread alone.

    The default dtype is torch's own again when the block ends, also by an error. Tensors that arithmetic of
    integers makes keep torch's own default. Not to be nested.
    """
    with _replaced(), _DefaultDtype() as mode:
        _own.mode = mode
        try:
            yield
        finally:
            del _own.mode


@contextmanager
def _replaced() -> Iterator[None]:
    """torch's two functions are replaced while a block runs in any thread; others see no difference."""
    global _blocks, _set_for_all, _get_for_all
    with _lock:
        if not _blocks:
            _set_for_all, _get_for_all = torch.set_default_dtype, torch.get_default_dtype
            torch.set_default_dtype, torch.get_default_dtype = _set_default_dtype, _get_default_dtype
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks:
                torch.set_default_dtype, torch.get_default_dtype = _set_for_all, _get_for_all


def _set_default_dtype(dtype: torch.dtype) -> None:
    mode: _DefaultDtype | None = getattr(_own, "mode", None)
    if mode is None:
        _set_for_all(dtype)
    else:
        mode.dtype = None if dtype is _get_for_all() else dtype


def _get_default_dtype() -> torch.dtype:
    mode: _DefaultDtype | None = getattr(_own, "mode", None)
    return _get_for_all() if mode is None or mode.dtype is None else mode.dtype
