"""One parked forward of one module: what it must share with others, how calls become one, and one many."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deployments.engine.argument_roles import LOOP_INVARIANT, SCALAR_TYPES, ArgumentRole, role_of
from deployments.engine.batch_key import BatchKey, key_component
from deployments.engine.call_signature import signature_of
from deployments.engine.fiber import Fiber

# its stub says that it gives back None
_split_copy: Callable[..., Sequence[Tensor]] = torch.split_with_sizes_copy  # type: ignore[assignment]


class Unsplittable(Exception):
    """The output has a tensor that belongs to no row; such a module runs call by call."""


class RaggedList(list[Any]):
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
    auxiliary_lane: bool = False  # not a step: computed beside the steps of others where there is a place
    batch_keys: weakref.WeakValueDictionary[Hashable, BatchKey] = field(
        default_factory=weakref.WeakValueDictionary
    )
    # of constant arguments, by (key, name); gone with any of the calls' tensors
    stacked_constants: dict[Hashable, _Stacked] = field(default_factory=dict)
    roles: dict[str, ArgumentRole] = field(default_factory=dict)  # of the arguments seen so far

    def role(self, argument: str) -> ArgumentRole:
        known = self.roles.get(argument)
        if known is None:
            known = self.roles[argument] = role_of(self.name.partition(".")[0], argument)
        return known


@dataclass(slots=True)
class ModuleCall:
    """A call of a seam with named arguments. Changed by nobody once it is parked."""

    seam: Seam
    arguments: dict[str, Any]
    batch_size: int  # pictures in it
    key: Hashable | None  # calls with equal keys fit into one forward; None fits with nobody
    lora_set: Hashable | None = None  # of its rows; see lora_rows.py

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
    recent = fiber.signatures.get(seam, ())
    for signature in recent:
        if signature.has_same_objects(arguments) and signature.matches_changing(arguments, fiber):
            return ModuleCall(seam, arguments, signature.batch_size, signature.key)
    for signature in recent:
        if signature.has_equal_objects(arguments) and signature.matches_changing(arguments, fiber):
            fiber.signatures[seam] = (signature.with_objects(arguments), recent[0])
            return ModuleCall(seam, arguments, signature.batch_size, signature.key)
    batch_size = _batch_size(seam, arguments)
    components = _key_components(seam, arguments, batch_size, fiber) if batch_size else None
    if components is None:
        return ModuleCall(seam, arguments, batch_size or 1, None)
    named = tuple((name, part) for name, part in components.items() if part is not None)
    key = seam.batch_keys.get(named)
    if key is None:
        key = seam.batch_keys[named] = BatchKey(named)
    fiber.signatures[seam] = (signature_of(seam, arguments, components, batch_size, key), *recent[:1])
    return ModuleCall(seam, arguments, batch_size, key)


def stack(calls: Sequence[ModuleCall]) -> dict[str, Any]:
    """Arguments of one forward for all `calls`, which share a key: rows in the order of the calls."""
    first = calls[0]
    if len(calls) == 1:
        return first.arguments
    seam, key = first.seam, first.key
    given = [call.arguments for call in calls]
    merged: dict[str, Any] = {}
    for name, value in first.arguments.items():
        if value is None or isinstance(value, SCALAR_TYPES):
            merged[name] = value
            continue
        role = seam.role(name)
        if role is ArgumentRole.TIMESTEP:
            merged[name] = _cat_timesteps([arguments[name] for arguments in given], calls)
        elif role is ArgumentRole.BATCH:
            merged[name] = _cat(seam, key, name, [arguments[name] for arguments in given])
        elif role is ArgumentRole.BATCH_DIM1:
            merged[name] = torch.cat([arguments[name] for arguments in given], dim=1)
        elif role is ArgumentRole.RAGGED:
            merged[name] = [entry for arguments in given for entry in arguments[name]]
        elif role is ArgumentRole.LAYOUT:
            merged[name] = [value[0]] * sum([call.batch_size for call in calls])
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
    if output is None or isinstance(output, SCALAR_TYPES):
        return [output] * len(sizes)
    if isinstance(output, Mapping):  # transformers' ModelOutput and diffusers' BaseOutput are dicts
        components = {name: split(value, sizes) for name, value in output.items()}
        make = type(output) if type(output) is not dict else None
        batch_size = [{name: part[i] for name, part in components.items()} for i in range(len(sizes))]
        return batch_size if make is None else [make(**row) for row in batch_size]
    if isinstance(output, RaggedList):
        return _split_ragged(output, sizes)
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
    batch_size, wanted = _batch_size(seam, arguments), list(indices)
    chosen: dict[str, Any] = {}
    for name, value in arguments.items():
        role = seam.role(name)
        if value is None or isinstance(value, SCALAR_TYPES):
            chosen[name] = value
        elif role is ArgumentRole.TIMESTEP:
            chosen[name] = _per_row(value, batch_size)[wanted]
        elif role is ArgumentRole.BATCH:
            chosen[name] = _take(value, wanted)
        elif role is ArgumentRole.BATCH_DIM1:
            chosen[name] = value[:, wanted]
        elif role is ArgumentRole.RAGGED:
            chosen[name] = [value[i] for i in wanted]
        elif role is ArgumentRole.LAYOUT:
            chosen[name] = [value[0]] * len(wanted)
        else:
            chosen[name] = value
    return chosen


_NO_SEAM = Seam("", lambda: None, ())


def _key_components(
    seam: Seam, arguments: Mapping[str, Any], batch_size: int, fiber: Fiber
) -> dict[str, Hashable | None] | None:
    """Every argument's part of the key, None where it needs none; None for all if one is unknown."""
    if arguments.get("use_cache") is True:  # the caller wants the cache that split leaves out
        return None
    components: dict[str, Hashable | None] = {}
    for name, value in arguments.items():
        if value is None:
            components[name] = None if name in seam.optional else ("None",)
        elif isinstance(value, SCALAR_TYPES):
            components[name] = (value,)
        else:
            part = components[name] = key_component(seam.role(name), value, batch_size, fiber)
            if part is None:
                return None
    return components


def _batch_size(seam: Seam, arguments: Mapping[str, Any]) -> int:
    """Rows of the first row-wise argument, 0 if there is none."""
    for name, value in arguments.items():
        role = seam.role(name)
        if role is ArgumentRole.BATCH and isinstance(value, Tensor) and value.ndim:
            return int(value.shape[0])
        if role is ArgumentRole.RAGGED and isinstance(value, list):
            return len(value)
    return 0


def _cat_timesteps(values: Sequence[Tensor], calls: Sequence[ModuleCall]) -> Tensor:
    """The times of all rows, as floats: (rows,), or (rows, tokens)."""
    batch_size = sum([call.batch_size for call in calls])
    dims = set(map(Tensor.dim, values))
    joined = None
    if dims == {0}:
        joined = torch.stack(list(values))
    elif 0 not in dims:
        joined = torch.cat(list(values))
    if joined is None or joined.shape[0] != batch_size:  # some calls have one time for several rows
        return torch.cat(
            [_per_row(value, call.batch_size) for value, call in zip(values, calls, strict=True)]
        )
    return joined if joined.is_floating_point() else joined.to(torch.float32)


def _per_row(timestep: Tensor, batch_size: int) -> Tensor:
    """(rows,) from a 0-d, one-entry or per-row timestep; (rows, tokens) as it is."""
    if not timestep.is_floating_point():
        timestep = timestep.to(torch.float32)
    if timestep.ndim > 1:
        return timestep
    return (
        timestep
        if timestep.ndim and timestep.shape[0] == batch_size
        else timestep.reshape(-1).expand(batch_size)
    )


def _cat(seam: Seam, key: Hashable, name: str, values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return (
            _stacked_constant(seam, key, name, values) if name in LOOP_INVARIANT else torch.cat(list(values))
        )
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


def _stacked_constant(seam: Seam, key: Hashable, name: str, values: Sequence[Tensor]) -> Tensor:
    """The stack of these tensors, made anew only when they are not those of last time."""
    ids = list(map(id, values))
    known = seam.stacked_constants.get((key, name))
    if known is not None and known.ids == ids:
        return known.joined

    def forget(_: object) -> None:
        seam.stacked_constants.pop((key, name), None)

    joined = torch.cat(list(values))
    seam.stacked_constants[key, name] = _Stacked(
        ids, [weakref.ref(value, forget) for value in values], joined
    )
    return joined


def _split_ragged(entries: RaggedList, sizes: Sequence[int]) -> list[Any]:
    if len(entries) != sum(sizes):
        raise Unsplittable(f"a list of {len(entries)} has not {sum(sizes)} rows")
    own = [entry.clone() for entry in entries]
    parts, start = [], 0
    for size in sizes:
        parts.append(RaggedList(own[start : start + size]))
        start += size
    return parts


def _take(value: Any, indices: list[int]) -> Any:
    if isinstance(value, Tensor):
        return value[indices]
    if isinstance(value, Mapping):
        return {name: _take(item, indices) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_take(item, indices) for item in value)
    return value
