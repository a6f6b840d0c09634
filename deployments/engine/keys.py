"""What calls must have in common to share a forward: the key, and each argument's part of it."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deployments.engine.kinds import Kind

if TYPE_CHECKING:
    from deployments.engine.fiber import Fiber


class Key:
    """What calls must have in common to share a forward. One object per seam and content: compare by `is`."""

    __slots__ = ("__weakref__", "parts")

    def __init__(self, parts: tuple[Hashable, ...]) -> None:
        self.parts = parts

    def __repr__(self) -> str:
        return f"Key{self.parts!r}"


def part_of(kind: Kind, value: Any, rows: int, fiber: Fiber) -> Hashable | None:
    """An argument's part of the key; None where it fits with nobody. rows: of its call."""
    match kind:
        case Kind.STEPS:
            return _steps_key(value, rows)
        case Kind.ROWS:
            return _rows_key(value, rows)
        case Kind.SECOND:
            if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != rows:
                return None
            return (value.shape[0], value.shape[2:], value.dtype, value.device)
        case Kind.ENTRIES:
            if not isinstance(value, list) or len(value) != rows:
                return None
            return _entries_key(value)
        case Kind.LAYOUT:
            if not isinstance(value, list) or not value or any(entry != value[0] for entry in value):
                return None
            return _plain_key(value[0])
        case Kind.SHARED:
            return _shared_key(value, fiber)
        case Kind.PLAIN:
            return _plain_key(value)


def _steps_key(value: Any, rows: int) -> Hashable | None:
    if not isinstance(value, Tensor) or (value.ndim and value.shape[0] not in (1, rows)):
        return None
    if value.ndim > 1 and value.shape[0] != rows:
        return None
    # integer timesteps (DDIM) and float ones (Euler) meet as float32: every model converts them so itself
    return (value.shape[1:], value.dtype if value.is_floating_point() else torch.float32, value.device)


def _rows_key(value: Any, rows: int) -> Hashable | None:
    if isinstance(value, Tensor):
        if value.ndim == 0 or value.shape[0] != rows:
            return None
        return (value.shape[1:], value.dtype, value.device)
    if isinstance(value, Mapping):
        parts = [(name, _rows_key(item, rows)) for name, item in value.items() if item is not None]
    elif isinstance(value, list | tuple):
        parts = [(str(i), _rows_key(item, rows)) for i, item in enumerate(value)]
    else:
        return None
    return None if any(part is None for _, part in parts) else (type(value).__name__, *parts)


def _entries_key(values: Sequence[Any]) -> Hashable | None:
    """The shapes in the list.

    The module pads to the longest entry and masks the padding: with the same shapes in a call, whatever
    their order and number, it pads the same.
    """
    if not all(isinstance(value, Tensor) for value in values):
        return None
    return frozenset((value.shape, value.dtype, value.device) for value in values)


def _shared_key(value: Any, fiber: Fiber) -> Hashable | None:
    """The value itself, as a digest; each tensor is hashed once per fiber, as hashing reads the device."""
    if isinstance(value, tuple | list):
        parts = tuple(_shared_key(item, fiber) for item in value)
        return None if None in parts else parts
    if not isinstance(value, Tensor):
        return None
    known = fiber.digests.get(id(value))
    if known is None:
        data = value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        known = (value, hashlib.blake2b(data.tobytes(), digest_size=16).digest())
        fiber.digests[id(value)] = known  # holds the tensor, so that its id stays taken
    return (value.shape, value.dtype, known[1])


def _plain_key(value: Any) -> Hashable | None:
    """Arguments without tensors are equal or not; one with a tensor inside is unknown to us."""
    if isinstance(value, Mapping):
        parts = [(str(name), _plain_key(item)) for name, item in value.items() if item is not None]
    elif isinstance(value, list | tuple):
        parts = [(str(i), _plain_key(item)) for i, item in enumerate(value)]
    elif value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return (type(value).__name__, value)
    else:
        return None
    return None if any(part is None for _, part in parts) else tuple(parts)
