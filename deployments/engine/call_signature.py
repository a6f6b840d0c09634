"""Knows a call again: a fiber's calls of one seam differ in little, and working out a key takes time."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deployments.engine.argument_roles import LOOP_INVARIANT, SCALAR_TYPES, ArgumentRole
from deployments.engine.batch_key import BatchKey, key_component

if TYPE_CHECKING:
    from deployments.engine.call import Seam
    from deployments.engine.fiber import Fiber


@dataclass(frozen=True, slots=True)
class CallSignature:
    """What a fiber's call looked like: enough to see quickly that the next one has the same key."""

    batch_size: int
    key: BatchKey
    count: int  # of arguments
    stable: Callable[[Mapping[str, Any]], tuple[Any, ...]]  # the arguments that mostly stay the same objects
    objects: tuple[Any, ...]  # these objects
    shared: tuple[bool, ...]  # of each: another object may have other values, which the key contains
    changing: tuple[tuple[str, torch.Size, torch.dtype], ...]  # tensors that are new in each call
    nested: tuple[tuple[str, ArgumentRole, Hashable], ...]  # with something inside: their parts of the key

    def has_same_objects(self, arguments: Mapping[str, Any]) -> bool:
        if len(arguments) != self.count:
            return False
        try:
            return all(map(operator.is_, self.stable(arguments), self.objects))
        except KeyError:  # other names
            return False

    def has_equal_objects(self, arguments: Mapping[str, Any]) -> bool:
        """Whether what is not the same object counts as the same."""
        if len(arguments) != self.count:
            return False
        try:
            found = self.stable(arguments)
        except KeyError:
            return False
        for value, objects, shared in zip(found, self.objects, self.shared, strict=True):
            if value is objects:
                continue
            if isinstance(objects, Tensor):
                if shared or not _has_form(value, objects.shape, objects.dtype):
                    return False
            elif isinstance(value, Tensor) or value != objects:
                return False
        return True

    def matches_changing(self, arguments: Mapping[str, Any], fiber: Fiber) -> bool:
        """Whether the other arguments, those that change, have the same parts of the key."""
        try:
            for name, shape, dtype in self.changing:
                if not _has_form(arguments[name], shape, dtype):
                    return False
            for name, role, component in self.nested:
                value = arguments[name]
                if type(value) is dict and not value and component == ():  # the usual attention_kwargs={}
                    continue
                if (
                    value is None
                    or isinstance(value, Tensor)
                    or key_component(role, value, self.batch_size, fiber) != component
                ):
                    return False
        except KeyError:
            return False
        return True

    def with_objects(self, arguments: Mapping[str, Any]) -> CallSignature:
        """The same look with these objects to compare the next call's with."""
        return replace(self, objects=self.stable(arguments))


def signature_of(
    seam: Seam,
    arguments: Mapping[str, Any],
    components: Mapping[str, Hashable | None],
    batch_size: int,
    key: BatchKey,
) -> CallSignature:
    """The look of a call whose arguments have these parts of the key."""
    stable: list[tuple[str, bool]] = []
    changing: list[tuple[str, torch.Size, torch.dtype]] = []
    nested: list[tuple[str, ArgumentRole, Hashable]] = []
    for name, value in arguments.items():
        role = seam.role(name)
        if value is None or isinstance(value, SCALAR_TYPES):
            stable.append((name, False))
        elif not isinstance(value, Tensor):
            nested.append((name, role, components[name]))
        elif role is ArgumentRole.SHARED or name in LOOP_INVARIANT:
            stable.append((name, role is ArgumentRole.SHARED))
        else:
            changing.append((name, value.shape, value.dtype))
    names = [name for name, _ in stable]
    getter = _getter(names)
    shared = tuple(is_shared for _, is_shared in stable)
    return CallSignature(
        batch_size, key, len(arguments), getter, getter(arguments), shared, tuple(changing), tuple(nested)
    )


def _getter(names: Sequence[str]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """Gives the values of these names as a tuple, which itemgetter does only for two or more."""
    if len(names) > 1:
        return operator.itemgetter(*names)
    return lambda arguments: tuple([arguments[name] for name in names])


def _has_form(value: Any, shape: torch.Size, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.shape == shape and value.dtype is dtype
