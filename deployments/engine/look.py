"""Knows a call again: a fiber's calls of one seam differ in little, and working out a key takes time."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deployments.engine.keys import Key, part_of
from deployments.engine.kinds import CONSTANT, PLAIN_TYPES, Kind

if TYPE_CHECKING:
    from deployments.engine.call import Seam
    from deployments.engine.fiber import Fiber


@dataclass(frozen=True, slots=True)
class Look:
    """What a fiber's call looked like: enough to see quickly that the next one has the same key."""

    rows: int
    key: Key
    count: int  # of arguments
    kept: Callable[[Mapping[str, Any]], tuple[Any, ...]]  # the arguments that mostly stay the same objects
    held: tuple[Any, ...]  # these objects
    shared: tuple[bool, ...]  # of each: another object may have other values, which the key contains
    moving: tuple[tuple[str, torch.Size, torch.dtype], ...]  # tensors that are new in each call
    inner: tuple[tuple[str, Kind, Hashable], ...]  # with something inside: their parts of the key

    def same_objects(self, arguments: Mapping[str, Any]) -> bool:
        if len(arguments) != self.count:
            return False
        try:
            return all(map(operator.is_, self.kept(arguments), self.held))
        except KeyError:  # other names
            return False

    def equal_objects(self, arguments: Mapping[str, Any]) -> bool:
        """Whether what is not the same object counts as the same."""
        if len(arguments) != self.count:
            return False
        try:
            found = self.kept(arguments)
        except KeyError:
            return False
        for value, held, shared in zip(found, self.held, self.shared, strict=True):
            if value is held:
                continue
            if isinstance(held, Tensor):
                if shared or not _same_form(value, held.shape, held.dtype):
                    return False
            elif isinstance(value, Tensor) or value != held:
                return False
        return True

    def fits(self, arguments: Mapping[str, Any], fiber: Fiber) -> bool:
        """Whether the other arguments, those that change, have the same parts of the key."""
        try:
            for name, shape, dtype in self.moving:
                if not _same_form(arguments[name], shape, dtype):
                    return False
            for name, kind, part in self.inner:
                value = arguments[name]
                if type(value) is dict and not value and part == ():  # the usual attention_kwargs={}
                    continue
                if (
                    value is None
                    or isinstance(value, Tensor)
                    or part_of(kind, value, self.rows, fiber) != part
                ):
                    return False
        except KeyError:
            return False
        return True

    def holding(self, arguments: Mapping[str, Any]) -> Look:
        """The same look with these objects to compare the next call's with."""
        return replace(self, held=self.kept(arguments))


def look_of(
    seam: Seam, arguments: Mapping[str, Any], parts: Mapping[str, Hashable | None], rows: int, key: Key
) -> Look:
    """The look of a call whose arguments have these parts of the key."""
    kept: list[tuple[str, bool]] = []
    moving: list[tuple[str, torch.Size, torch.dtype]] = []
    inner: list[tuple[str, Kind, Hashable]] = []
    for name, value in arguments.items():
        kind = seam.kind(name)
        if value is None or isinstance(value, PLAIN_TYPES):
            kept.append((name, False))
        elif not isinstance(value, Tensor):
            inner.append((name, kind, parts[name]))
        elif kind is Kind.SHARED or name in CONSTANT:
            kept.append((name, kind is Kind.SHARED))
        else:
            moving.append((name, value.shape, value.dtype))
    names = [name for name, _ in kept]
    getter = _getter(names)
    shared = tuple(is_shared for _, is_shared in kept)
    return Look(rows, key, len(arguments), getter, getter(arguments), shared, tuple(moving), tuple(inner))


def _getter(names: Sequence[str]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """Gives the values of these names as a tuple, which itemgetter does only for two or more."""
    if len(names) > 1:
        return operator.itemgetter(*names)
    return lambda arguments: tuple([arguments[name] for name in names])


def _same_form(value: Any, shape: torch.Size, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.shape == shape and value.dtype is dtype
