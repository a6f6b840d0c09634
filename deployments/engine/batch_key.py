"""What calls must have in common to share a forward: the key, and each argument's part of it."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deployments.engine.argument_roles import ArgumentRole

if TYPE_CHECKING:
    from deployments.engine.fiber import Fiber


class BatchKey:
    """What calls must have in common to share a forward. One object per seam and content: compare by `is`."""

    __slots__ = ("__weakref__", "components")

    def __init__(self, components: tuple[Hashable, ...]) -> None:
        self.components = components

    def __repr__(self) -> str:
        return f"Key{self.components!r}"


def key_component(role: ArgumentRole, value: Any, batch_size: int, fiber: Fiber) -> Hashable | None:
    """An argument's part of the key; None where it fits with nobody. rows: of its call."""
    match role:
        case ArgumentRole.TIMESTEP:
            return _timestep_component(value, batch_size)
        case ArgumentRole.BATCH:
            return _batch_component(value, batch_size)
        case ArgumentRole.BATCH_DIM1:
            if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != batch_size:
                return None
            return (value.shape[0], value.shape[2:], value.dtype, value.device)
        case ArgumentRole.RAGGED:
            if not isinstance(value, list) or len(value) != batch_size:
                return None
            return _ragged_component(value)
        case ArgumentRole.LAYOUT:
            if not isinstance(value, list) or not value or any(entry != value[0] for entry in value):
                return None
            return _static_component(value[0])
        case ArgumentRole.SHARED:
            return _shared_component(value, fiber)
        case ArgumentRole.STATIC:
            return _static_component(value)


def _timestep_component(value: Any, batch_size: int) -> Hashable | None:
    if not isinstance(value, Tensor) or (value.ndim and value.shape[0] not in (1, batch_size)):
        return None
    if value.ndim > 1 and value.shape[0] != batch_size:
        return None
    # integer timesteps (DDIM) and float ones (Euler) meet as float32: every model converts them so itself
    return (value.shape[1:], value.dtype if value.is_floating_point() else torch.float32, value.device)


def _batch_component(value: Any, batch_size: int) -> Hashable | None:
    if isinstance(value, Tensor):
        if value.ndim == 0 or value.shape[0] != batch_size:
            return None
        return (value.shape[1:], value.dtype, value.device)
    if isinstance(value, Mapping):
        components = [
            (name, _batch_component(item, batch_size)) for name, item in value.items() if item is not None
        ]
    elif isinstance(value, list | tuple):
        components = [(str(i), _batch_component(item, batch_size)) for i, item in enumerate(value)]
    else:
        return None
    return (
        None if any(component is None for _, component in components) else (type(value).__name__, *components)
    )


def _ragged_component(values: Sequence[Any]) -> Hashable | None:
    """The shapes in the list.

    The module pads to the longest entry and masks the padding: with the same shapes in a call, whatever
    their order and number, it pads the same.
    """
    if not all(isinstance(value, Tensor) for value in values):
        return None
    return frozenset((value.shape, value.dtype, value.device) for value in values)


def _shared_component(value: Any, fiber: Fiber) -> Hashable | None:
    """The value itself, as a digest; each tensor is hashed once per fiber, as hashing reads the device."""
    if isinstance(value, tuple | list):
        components = tuple(_shared_component(item, fiber) for item in value)
        return None if None in components else components
    if not isinstance(value, Tensor):
        return None
    known = fiber.digests.get(id(value))
    if known is None:
        data = value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        known = (value, hashlib.blake2b(data.tobytes(), digest_size=16).digest())
        fiber.digests[id(value)] = known  # holds the tensor, so that its id stays taken
    return (value.shape, value.dtype, known[1])


def _static_component(value: Any) -> Hashable | None:
    """Arguments without tensors are equal or not; one with a tensor inside is unknown to us."""
    if isinstance(value, Mapping):
        components = [
            (str(name), _static_component(item)) for name, item in value.items() if item is not None
        ]
    elif isinstance(value, list | tuple):
        components = [(str(i), _static_component(item)) for i, item in enumerate(value)]
    elif value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return (type(value).__name__, value)
    else:
        return None
    return None if any(component is None for _, component in components) else tuple(components)
