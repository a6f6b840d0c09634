"""The fast path to a batch key: recognises a call that has the key of an earlier call of its fiber."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from deployments.engine.argument_roles import LOOP_INVARIANT, SCALAR_TYPES, ArgumentRole
from deployments.engine.batch_key import BatchKey, DigestCache, key_component

KEYED_BY_VALUE = frozenset({ArgumentRole.SHARED, ArgumentRole.ROW_VALUES})  # the key contains the values
EMPTY_DICT = ("dict",)  # the key component of {}


@dataclass(frozen=True, slots=True)
class CallSignature:
    """What is kept of a call: enough to see quickly that the next one has the same key.

    Devices are not compared: all tensors of one module are on the module's device.
    """

    batch_size: int
    key: BatchKey
    count: int  # of arguments
    stable: Callable[[Mapping[str, Any]], tuple[Any, ...]]  # the arguments that are usually the same objects
    objects: tuple[Any, ...]  # these arguments of the call
    shared: tuple[bool, ...]  # of each: whether the key contains its values, so that only the object will do
    changing: tuple[tuple[str, torch.Size, torch.dtype], ...]  # tensors that are new in each call
    nested: tuple[tuple[str, ArgumentRole, Hashable], ...]  # containers: name, role, component of the key

    def has_same_objects(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the stable arguments are the same objects."""
        if len(arguments) != self.count:
            return False
        try:
            return all(map(operator.is_, self.stable(arguments), self.objects))
        except KeyError:  # other names
            return False

    def has_equal_objects(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the stable arguments are the same or have an equal effect on the key."""
        if len(arguments) != self.count:
            return False
        try:
            found = self.stable(arguments)
        except KeyError:
            return False
        for value, known, shared in zip(found, self.objects, self.shared, strict=True):
            if value is known:
                continue
            if isinstance(known, Tensor):
                if shared or not _has_form(value, known.shape, known.dtype):
                    return False
            elif isinstance(value, Tensor) or value != known:
                return False
        return True

    def matches_changing(self, arguments: Mapping[str, Any], digests: DigestCache) -> bool:
        """Whether all other arguments have the same components of the key."""
        try:
            for name, shape, dtype in self.changing:
                tensor = arguments[name]
                if tensor.shape != shape or tensor.dtype is not dtype:
                    return False
            for name, role, component in self.nested:
                value = arguments[name]
                if type(value) is dict and not value and component == EMPTY_DICT:  # attention_kwargs={}
                    continue
                if (
                    value is None
                    or isinstance(value, Tensor)
                    or key_component(role, value, self.batch_size, digests) != component
                ):
                    return False
        except (KeyError, AttributeError):  # other names; what was a tensor is none
            return False
        return True

    def with_objects(self, arguments: Mapping[str, Any]) -> CallSignature:
        """The same signature with these stable arguments to compare the next call's with."""
        return replace(self, objects=self.stable(arguments))


@dataclass(frozen=True, slots=True)
class KeyCache:
    """What one fiber has keyed. Holds tensors of its last calls."""

    signatures: dict[Hashable, tuple[CallSignature, ...]] = field(default_factory=dict)  # at most 2 per seam


def signature_of(
    arguments: Mapping[str, Any],
    roles: Callable[[str], ArgumentRole],
    components: Mapping[str, Hashable | None],
    batch_size: int,
    key: BatchKey,
) -> CallSignature:
    """The signature of a call whose arguments have these components of the key."""
    stable: list[tuple[str, bool]] = []
    changing: list[tuple[str, torch.Size, torch.dtype]] = []
    nested: list[tuple[str, ArgumentRole, Hashable]] = []
    for name, value in arguments.items():
        role = roles(name)
        if value is None or isinstance(value, SCALAR_TYPES):
            stable.append((name, False))
        elif not isinstance(value, Tensor):
            nested.append((name, role, components[name]))
        elif role in KEYED_BY_VALUE or name in LOOP_INVARIANT:
            stable.append((name, role in KEYED_BY_VALUE))
        else:
            changing.append((name, value.shape, value.dtype))
    getter = _getter([name for name, _ in stable])
    return CallSignature(
        batch_size,
        key,
        len(arguments),
        getter,
        getter(arguments),
        tuple(shared for _, shared in stable),
        tuple(changing),
        tuple(nested),
    )


def _getter(names: Sequence[str]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """Gives the values of these names as a tuple, which itemgetter does only for two or more."""
    if len(names) > 1:
        return operator.itemgetter(*names)
    return lambda arguments: tuple([arguments[name] for name in names])


def _has_form(value: Any, shape: torch.Size, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.shape == shape and value.dtype is dtype
