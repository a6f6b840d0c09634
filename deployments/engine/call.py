"""One parked forward of one module: what it must share with others, how calls become one, and one many."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deployments.engine.fiber import Fiber
from deployments.engine.keys import Key, part_of
from deployments.engine.kinds import CONSTANT, PLAIN_TYPES, Kind, kind_of
from deployments.engine.look import look_of

# its stub says that it gives back None
_split_copy: Callable[..., Sequence[Tensor]] = torch.split_with_sizes_copy  # type: ignore[assignment]


class Unsplittable(Exception):
    """The output has a tensor that belongs to no row; such a module runs call by call."""


class Entries(list[Any]):
    """An output list with one tensor per picture, to be told from a list of tensors of many rows."""


@dataclass(frozen=True, slots=True, eq=False)
class Seam:
    """One interceptable function of a module: the forward of a transformer, the decode of a VAE.

    `keys`, `stacked` and `kinds` are memories of this module.
    """

    name: str  # for logs and metrics, such as "FluxTransformer2DModel.forward"
    function: Callable[..., Any]  # the module's own bound function
    positions: tuple[str, ...]  # parameter names in order
    mergeable: bool = True  # False: stateful or unknown; its calls never share a forward
    optional: frozenset[str] = frozenset()  # parameters for which None is as good as nothing
    aside: bool = False  # not a step: computed beside the steps of others where there is a place
    keys: weakref.WeakValueDictionary[Hashable, Key] = field(default_factory=weakref.WeakValueDictionary)
    # of constant arguments, by (key, name); gone with any of the calls' tensors
    stacked: dict[Hashable, _Stacked] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)  # of the arguments seen so far

    def kind(self, argument: str) -> Kind:
        known = self.kinds.get(argument)
        if known is None:
            known = self.kinds[argument] = kind_of(self.name.partition(".")[0], argument)
        return known


@dataclass(slots=True)
class ModuleCall:
    """A call of a seam with named arguments. Changed by nobody once it is parked."""

    seam: Seam
    arguments: dict[str, Any]
    rows: int  # pictures in it
    key: Hashable | None  # calls with equal keys fit into one forward; None fits with nobody
    owner: Hashable | None = None  # of its rows; see owners.py

    def run(self) -> Any:
        """The module's own answer to this call alone, bit for bit what the pipeline would get."""
        return self.seam.function(**self.arguments)


def make_call(seam: Seam, fiber: Fiber, args: Sequence[Any], kwargs: dict[str, Any]) -> ModuleCall:
    """The call with every argument named and its key worked out.

    A fiber's calls of one seam differ in little: one that looks like one of the last two has its key.
    """
    arguments = {**dict(zip(seam.positions, args, strict=False)), **kwargs} if args else kwargs
    if not seam.mergeable:
        return ModuleCall(seam, arguments, 1, None)
    recent = fiber.looks.get(seam, ())
    for look in recent:
        if look.same_objects(arguments) and look.fits(arguments, fiber):
            return ModuleCall(seam, arguments, look.rows, look.key)
    for look in recent:
        if look.equal_objects(arguments) and look.fits(arguments, fiber):
            fiber.looks[seam] = (look.holding(arguments), recent[0])
            return ModuleCall(seam, arguments, look.rows, look.key)
    rows = _row_count(seam, arguments)
    parts = _parts(seam, arguments, rows, fiber) if rows else None
    if parts is None:
        return ModuleCall(seam, arguments, rows or 1, None)
    named = tuple((name, part) for name, part in parts.items() if part is not None)
    key = seam.keys.get(named)
    if key is None:
        key = seam.keys[named] = Key(named)
    fiber.looks[seam] = (look_of(seam, arguments, parts, rows, key), *recent[:1])
    return ModuleCall(seam, arguments, rows, key)


def stack(calls: Sequence[ModuleCall]) -> dict[str, Any]:
    """Arguments of one forward for all `calls`, which share a key: rows in the order of the calls."""
    first = calls[0]
    if len(calls) == 1:
        return first.arguments
    seam, key = first.seam, first.key
    given = [call.arguments for call in calls]
    merged: dict[str, Any] = {}
    for name, value in first.arguments.items():
        if value is None or isinstance(value, PLAIN_TYPES):
            merged[name] = value
            continue
        kind = seam.kind(name)
        if kind is Kind.STEPS:
            merged[name] = _cat_times([arguments[name] for arguments in given], calls)
        elif kind is Kind.ROWS:
            merged[name] = _cat(seam, key, name, [arguments[name] for arguments in given])
        elif kind is Kind.SECOND:
            merged[name] = torch.cat([arguments[name] for arguments in given], dim=1)
        elif kind is Kind.ENTRIES:
            merged[name] = [entry for arguments in given for entry in arguments[name]]
        elif kind is Kind.LAYOUT:
            merged[name] = [value[0]] * sum([call.rows for call in calls])
        else:
            merged[name] = value
    return merged


def split(output: Any, sizes: Sequence[int]) -> list[Any]:
    """The output's rows dealt back to calls of `sizes` rows, each in memory of its own.

    Copies, not views: a view of one row would keep the whole batch's output alive.  The caches that
    language models hand out with an answer are left out (None): no pipeline goes on from a merged call.
    Raises Unsplittable if a tensor's first dimension is not the number of rows.
    """
    if isinstance(output, Tensor):
        total = sum(sizes)
        if output.ndim == 0 or output.shape[0] != total:
            raise Unsplittable(f"an output of shape {tuple(output.shape)} has not {total} rows")
        if output.is_contiguous():
            return list(_split_copy(output, list(sizes)))
        return [part.clone() for part in output.split_with_sizes(list(sizes))]  # in the layout they have
    if output is None or isinstance(output, PLAIN_TYPES):
        return [output] * len(sizes)
    if isinstance(output, Mapping):  # transformers' ModelOutput and diffusers' BaseOutput are dicts
        parts = {name: split(value, sizes) for name, value in output.items()}
        make = type(output) if type(output) is not dict else None
        rows = [{name: part[i] for name, part in parts.items()} for i in range(len(sizes))]
        return rows if make is None else [make(**row) for row in rows]
    if isinstance(output, Entries):
        return _deal(output, sizes)
    if isinstance(output, list | tuple):
        columns = [split(value, sizes) for value in output]
        return [type(output)(row) for row in zip(*columns, strict=True)] or [type(output)() for _ in sizes]
    if type(output).__name__.endswith("Cache"):
        return [None] * len(sizes)
    raise Unsplittable(f"an output of type {type(output).__name__} has no rows")


def select_rows(
    arguments: Mapping[str, Any], indices: Sequence[int], seam: Seam | None = None
) -> dict[str, Any]:
    """Arguments of a forward of these rows of `arguments`, in this order; a row may come repeatedly."""
    seam = seam or _NO_SEAM
    rows, wanted = _row_count(seam, arguments), list(indices)
    chosen: dict[str, Any] = {}
    for name, value in arguments.items():
        kind = seam.kind(name)
        if value is None or isinstance(value, PLAIN_TYPES):
            chosen[name] = value
        elif kind is Kind.STEPS:
            chosen[name] = _per_row(value, rows)[wanted]
        elif kind is Kind.ROWS:
            chosen[name] = _take(value, wanted)
        elif kind is Kind.SECOND:
            chosen[name] = value[:, wanted]
        elif kind is Kind.ENTRIES:
            chosen[name] = [value[i] for i in wanted]
        elif kind is Kind.LAYOUT:
            chosen[name] = [value[0]] * len(wanted)
        else:
            chosen[name] = value
    return chosen


_NO_SEAM = Seam("", lambda: None, ())


def _parts(
    seam: Seam, arguments: Mapping[str, Any], rows: int, fiber: Fiber
) -> dict[str, Hashable | None] | None:
    """Every argument's part of the key, None where it needs none; None for all if one is unknown."""
    if arguments.get("use_cache") is True:  # the caller wants the cache that split leaves out
        return None
    parts: dict[str, Hashable | None] = {}
    for name, value in arguments.items():
        if value is None:
            parts[name] = None if name in seam.optional else ("None",)
        elif isinstance(value, PLAIN_TYPES):
            parts[name] = (value,)
        else:
            part = parts[name] = part_of(seam.kind(name), value, rows, fiber)
            if part is None:
                return None
    return parts


def _row_count(seam: Seam, arguments: Mapping[str, Any]) -> int:
    """Rows of the first row-wise argument, 0 if there is none."""
    for name, value in arguments.items():
        kind = seam.kind(name)
        if kind is Kind.ROWS and isinstance(value, Tensor) and value.ndim:
            return int(value.shape[0])
        if kind is Kind.ENTRIES and isinstance(value, list):
            return len(value)
    return 0


def _cat_times(values: Sequence[Tensor], calls: Sequence[ModuleCall]) -> Tensor:
    """The times of all rows, as floats: (rows,), or (rows, tokens)."""
    rows = sum([call.rows for call in calls])
    dims = set(map(Tensor.dim, values))
    joined = None
    if dims == {0}:
        joined = torch.stack(list(values))
    elif 0 not in dims:
        joined = torch.cat(list(values))
    if joined is None or joined.shape[0] != rows:  # some calls have one time for several rows
        return torch.cat([_per_row(value, call.rows) for value, call in zip(values, calls, strict=True)])
    return joined if joined.is_floating_point() else joined.to(torch.float32)


def _per_row(timestep: Tensor, rows: int) -> Tensor:
    """(rows,) from a 0-d, one-entry or per-row timestep; (rows, tokens) as it is."""
    if not timestep.is_floating_point():
        timestep = timestep.to(torch.float32)
    if timestep.ndim > 1:
        return timestep
    return timestep if timestep.ndim and timestep.shape[0] == rows else timestep.reshape(-1).expand(rows)


def _cat(seam: Seam, key: Hashable, name: str, values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return _remembered(seam, key, name, values) if name in CONSTANT else torch.cat(list(values))
    if isinstance(first, Mapping):
        return {
            part: _cat(seam, key, str(part), [value[part] for value in values]) if item is not None else None
            for part, item in first.items()
        }
    if isinstance(first, list | tuple):
        columns: Iterable[Any] = zip(*values, strict=True)
        return type(first)(_cat(seam, key, "", column) for column in columns)
    return first


@dataclass(frozen=True, slots=True)
class _Stacked:
    """One constant argument of a batch."""

    ids: list[int]  # of the calls' tensors; all of them live while this exists
    deaths: list[weakref.ref[Tensor]]  # whose callbacks remove it
    joined: Tensor


def _remembered(seam: Seam, key: Hashable, name: str, values: Sequence[Tensor]) -> Tensor:
    """The stack of these tensors, made anew only when they are not those of last time."""
    ids = list(map(id, values))
    known = seam.stacked.get((key, name))
    if known is not None and known.ids == ids:
        return known.joined

    def forget(_: object) -> None:
        seam.stacked.pop((key, name), None)

    joined = torch.cat(list(values))
    seam.stacked[key, name] = _Stacked(ids, [weakref.ref(value, forget) for value in values], joined)
    return joined


def _deal(entries: Entries, sizes: Sequence[int]) -> list[Any]:
    if len(entries) != sum(sizes):
        raise Unsplittable(f"a list of {len(entries)} has not {sum(sizes)} rows")
    own = [entry.clone() for entry in entries]
    dealt, start = [], 0
    for size in sizes:
        dealt.append(Entries(own[start : start + size]))
        start += size
    return dealt


def _take(value: Any, indices: list[int]) -> Any:
    if isinstance(value, Tensor):
        return value[indices]
    if isinstance(value, Mapping):
        return {name: _take(item, indices) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_take(item, indices) for item in value)
    return value
