"""The LoRA set of every row of the current forward: set by the engine, read by the LoRA layers' hooks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

_current_rows: ContextVar[LoraRows | None] = ContextVar("lora_rows", default=None)


@dataclass(slots=True)
class LoraRows:
    """The LoRA set of every row of one forward; None for rows without LoRAs and for padding."""

    lora_sets: tuple[Hashable | None, ...]
    cache: Any = None  # for the hooks; lives as long as the forward


def current_lora_rows() -> LoraRows | None:
    """Those of the forward that this code runs in; None if no row has LoRAs."""
    return _current_rows.get()


def run_with_lora_rows(
    lora_sets: Sequence[Hashable | None], sizes: Sequence[int], forward: Callable[[], T]
) -> T:
    """The forward's output, run with lora_sets[i] applied to the next sizes[i] rows."""
    if not any(lora_set is not None for lora_set in lora_sets):
        return forward()
    rows = [lora_set for lora_set, size in zip(lora_sets, sizes, strict=True) for _ in range(size)]
    token = _current_rows.set(LoraRows(tuple(rows)))
    try:
        return forward()
    finally:
        _current_rows.reset(token)
