"""The batch key: what calls of one seam must have in common to share a forward."""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from deployments.engine.argument_roles import ArgumentRole


class BatchKey:
    """One object per seam and content, so that keys are compared by `is`."""

    __slots__ = ("__weakref__", "components")

    def __init__(self, components: tuple[Hashable, ...]) -> None:
        self.components = components

    def __repr__(self) -> str:
        return f"BatchKey{self.components!r}"


class DigestCache:
    """Digests of tensors by object: each is copied from the device once, as long as it lives.

    They must not be written to in place; where torch counts writes, one that was is read again. Two tensors
    of one shape may have other values (the ids of 64x96 and 96x64 pictures), so nothing less than the object
    stands for them.
    """

    __slots__ = ("_digests",)

    def __init__(self) -> None:
        self._digests: dict[int, tuple[weakref.ref[Tensor], int | None, tuple[bytes, ...]]] = {}

    def __len__(self) -> int:
        return len(self._digests)

    def digest(self, tensor: Tensor) -> bytes:
        """16 bytes of BLAKE2b over the tensor's values."""
        return self._of(tensor, 1)[0]

    def row_digests(self, tensor: Tensor) -> tuple[bytes, ...]:
        """The digests of the tensor's rows, which are along its first dimension."""
        return self._of(tensor, tensor.shape[0])

    def _of(self, tensor: Tensor, parts: int) -> tuple[bytes, ...]:
        """One digest for each of so many equal parts of the tensor. One tensor always has as many parts."""
        known, version = self._digests.get(id(tensor)), _writes(tensor)
        if known is not None and known[0]() is tensor and known[1] == version and len(known[2]) == parts:
            return known[2]
        data = tensor.detach().contiguous().cpu().reshape(parts, -1).view(torch.uint8).numpy()
        digests = tuple(hashlib.blake2b(part.tobytes(), digest_size=16).digest() for part in data)
        self._remember(tensor, version, digests)
        return digests

    def _remember(self, tensor: Tensor, version: int | None, digests: tuple[bytes, ...]) -> None:
        place = id(tensor)

        def forget(reference: weakref.ref[Tensor]) -> None:
            known = self._digests.get(place)
            if known is not None and known[0] is reference:  # not of another tensor at the same address
                del self._digests[place]

        self._digests[place] = (weakref.ref(tensor, forget), version, digests)


def _writes(tensor: Tensor) -> int | None:
    """How often the tensor was written to in place; None for one that was made in inference mode."""
    return None if tensor.is_inference() else tensor._version  # noqa: SLF001  no public name


def key_component(role: ArgumentRole, value: Any, batch_size: int, digests: DigestCache) -> Hashable | None:
    """The component of an argument that is neither None nor a scalar; None if its call fits no batch.

    batch_size: of the call.
    """
    match role:
        case ArgumentRole.TIMESTEP:
            return _timestep_component(value, batch_size)
        case ArgumentRole.BATCH | ArgumentRole.BROADCAST:
            return _batch_component(value, batch_size, or_one_row=role is ArgumentRole.BROADCAST)
        case ArgumentRole.BATCH_DIM1:
            return _batch_dim1_component(value, batch_size)
        case ArgumentRole.ROW_VALUES:
            return _row_values_component(value, batch_size, digests)
        case ArgumentRole.RAGGED:
            return _ragged_component(value, batch_size)
        case _:
            return _component_without_rows(role, value, digests)


def _component_without_rows(role: ArgumentRole, value: Any, digests: DigestCache) -> Hashable | None:
    match role:
        case ArgumentRole.LAYOUT:
            return _layout_component(value)
        case ArgumentRole.SHARED:
            return _shared_component(value, digests)
        case ArgumentRole.CACHE:
            return _cache_component(value)
        case _:
            return _nested_component(value, _static_leaf)


def _timestep_component(value: Any, batch_size: int) -> Hashable | None:
    if not isinstance(value, Tensor) or (value.ndim and value.shape[0] not in (1, batch_size)):
        return None
    if value.ndim > 1 and value.shape[0] != batch_size:
        return None
    # integer timesteps (DDIM) and float ones (Euler) share forwards: every module converts them to float32
    return (value.shape[1:], value.dtype if value.is_floating_point() else torch.float32, value.device)


def _batch_component(value: Any, batch_size: int, *, or_one_row: bool = False) -> Hashable | None:
    def leaf(item: Any) -> Hashable | None:
        if item is None:  # such as the picture of a tuple of text and picture
            return ("None",)
        if not isinstance(item, Tensor) or item.ndim == 0:
            return None
        if item.shape[0] != batch_size and not (or_one_row and item.shape[0] == 1):
            return None
        return (item.shape[1:], item.dtype, item.device)

    return _nested_component(value, leaf)


def _batch_dim1_component(value: Any, batch_size: int) -> Hashable | None:
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != batch_size:
        return None
    return (value.shape[0], value.shape[2:], value.dtype, value.device)


def _row_values_component(value: Any, batch_size: int, digests: DigestCache) -> Hashable | None:
    """The first row and the set of all: what modules read of such a tensor (its first row, its largest value)
    follows from these, whatever the number of rows."""
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != batch_size:
        return None
    rows = digests.row_digests(value)
    return (value.shape[1:], value.dtype, rows[0], frozenset(rows))


def _ragged_component(value: Any, batch_size: int) -> Hashable | None:
    """The set of items, of tensors their shapes: the module pads to the longest item and masks the padding,
    so with equal sets it pads equally, whatever the order and the number of items."""

    def leaf(item: Any) -> Hashable | None:
        return (item.shape, item.dtype, item.device) if isinstance(item, Tensor) else _static_leaf(item)

    if not isinstance(value, list) or len(value) != batch_size:
        return None
    components = [_nested_component(item, leaf) for item in value]
    return None if None in components else frozenset(components)


def _layout_component(value: Any) -> Hashable | None:
    if not isinstance(value, list) or not value or any(entry != value[0] for entry in value):
        return None
    return _nested_component(value[0], _static_leaf)


def _shared_component(value: Any, digests: DigestCache) -> Hashable | None:
    """Shape, dtype and digest of the values, also of tensors and plain values in dicts, lists and tuples."""

    def leaf(item: Any) -> Hashable | None:
        if not isinstance(item, Tensor):
            return _static_leaf(item)
        return (item.shape, item.dtype, digests.digest(item))

    return _nested_component(value, leaf)


def _cache_component(value: Any) -> Hashable | None:
    """One component for all caches that the forward neither reads nor writes."""
    layers = vars(value).get("caches", ())  # of GlmImageKVCache
    return ("unused",) if layers and all(layer.mode in (None, "skip") for layer in layers) else None


def _static_leaf(item: Any) -> Hashable | None:
    if item is None or isinstance(item, bool | int | float | str | torch.dtype):
        return (type(item).__name__, item)
    return None


def _nested_component(value: Any, leaf: Callable[[Any], Hashable | None]) -> Hashable | None:
    """The components of all leaves of nested dicts, lists and tuples; None if one leaf has none.

    An entry of a dict that is None counts as missing. Written by hand: torch's pytree takes three times as
    long for the one or two tensors that most arguments hold, and this runs for every call.
    """
    kind = type(value)
    items: list[tuple[object, Hashable | None]]
    if kind is list or kind is tuple:
        items = [(index, _nested_component(item, leaf)) for index, item in enumerate(value)]
    elif kind is dict or kind is OrderedDict:
        items = [
            (str(name), _nested_component(item, leaf)) for name, item in value.items() if item is not None
        ]
    else:
        return leaf(value)
    for _, component in items:
        if component is None:
            return None
    return (kind.__name__, *items)
