"""Whose rows a forward computes: the engine says it around the forward, adapters read it inside."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

_rows: ContextVar[Rows | None] = ContextVar("rows", default=None)


@dataclass(slots=True)
class Rows:
    """The owner of every row of one forward; None for rows without one, and for padding."""

    owners: tuple[Hashable | None, ...]
    memo: Any = None  # of whoever reads this, for the length of the forward


def rows_at_hand() -> Rows | None:
    """Of the forward that this code runs in; None where no row has an owner."""
    return _rows.get()


def owned(owners: Sequence[Hashable | None], sizes: Sequence[int], forward: Callable[[], T]) -> T:
    """The forward's answer, run with owners[i] owning the next sizes[i] rows."""
    if not any(owner is not None for owner in owners):
        return forward()
    rows = [owner for owner, size in zip(owners, sizes, strict=True) for _ in range(size)]
    token = _rows.set(Rows(tuple(rows)))
    try:
        return forward()
    finally:
        _rows.reset(token)
