"""Stacks the arguments of calls that share a forward, and splits the forward's output among them.

Nested outputs are taken apart by torch's pytree, in which diffusers and transformers register their outputs.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_map_only, tree_unflatten

from deployments.engine.argument_roles import LOOP_INVARIANT, SCALAR_TYPES, ArgumentRole
from deployments.engine.call import ModuleCall, Seam, StackedConstant

# its stub says that it returns None
_split_copy: Callable[..., Sequence[Tensor]] = torch.split_with_sizes_copy  # type: ignore[assignment]


class Unsplittable(Exception):
    """The output has a tensor without a batch dimension; such a module runs call by call."""


class RaggedList(list[Any]):
    """An output list with one tensor per row, as opposed to a list of tensors that have all rows each."""


register_pytree_node(
    RaggedList,
    lambda ragged: (list(ragged), None),
    lambda items, _context: RaggedList(items),
    serialized_type_name="weft.RaggedList",
)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same nested value with `function` applied to its tensors."""
    return function(tree) if isinstance(tree, Tensor) else tree_map_only(Tensor, function, tree)


def stack(calls: Sequence[ModuleCall]) -> dict[str, Any]:
    """Arguments of one forward for all `calls`, which share a key; rows in the order of the calls."""
    first = calls[0]
    if len(calls) == 1:
        return first.arguments
    seam, key = first.seam, first.key
    given = [call.arguments for call in calls]
    stacked: dict[str, Any] = {}
    for name, value in first.arguments.items():
        if value is None or isinstance(value, SCALAR_TYPES):
            stacked[name] = value
            continue
        role = seam.role(name)
        if role is ArgumentRole.TIMESTEP:
            stacked[name] = _cat_timesteps([arguments[name] for arguments in given], calls)
        elif role in (ArgumentRole.BATCH, ArgumentRole.ROW_VALUES):
            stacked[name] = _cat(seam, key, name, [arguments[name] for arguments in given])
        elif role is ArgumentRole.BROADCAST:
            stacked[name] = _cat(
                seam, key, name, [_broadcast(call.arguments[name], call.batch_size) for call in calls]
            )
        elif role is ArgumentRole.BATCH_DIM1:
            stacked[name] = torch.cat([arguments[name] for arguments in given], dim=1)
        elif role is ArgumentRole.RAGGED:
            stacked[name] = [item for arguments in given for item in arguments[name]]
        elif role is ArgumentRole.LAYOUT:
            stacked[name] = [value[0]] * sum([call.batch_size for call in calls])
        else:
            stacked[name] = value
    return stacked


def select_rows(seam: Seam, arguments: Mapping[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    """Arguments of a forward of these rows of `arguments`, in this order; indices may repeat."""
    batch_size, wanted = seam.batch_size(arguments), tuple(indices)
    selected: dict[str, Any] = {}
    for name, value in arguments.items():
        role = seam.role(name)
        if value is None or isinstance(value, SCALAR_TYPES):
            selected[name] = value
        elif role is ArgumentRole.TIMESTEP:
            selected[name] = _rows(_timestep_rows(value, batch_size), wanted)
        elif role in (ArgumentRole.BATCH, ArgumentRole.ROW_VALUES):
            selected[name] = map_tensors(lambda tensor: _rows(tensor, wanted), value)
        elif role is ArgumentRole.BROADCAST:
            every = _broadcast(value, batch_size)
            selected[name] = map_tensors(lambda tensor: _rows(tensor, wanted), every)
        elif role is ArgumentRole.BATCH_DIM1:
            selected[name] = _rows(value, wanted, dim=1)
        elif role is ArgumentRole.RAGGED:
            selected[name] = [value[index] for index in wanted]
        elif role is ArgumentRole.LAYOUT:
            selected[name] = [value[0]] * len(wanted)
        else:
            selected[name] = value
    return selected


def split(output: Any, sizes: Sequence[int]) -> list[Any]:
    """The output's rows, in parts of `sizes` rows, one per call.

    Every part has memory of its own: a view of one row would keep the whole batch's output alive. The caches
    of language models are left out (None): no pipeline continues from a call that may be merged.
    Raises Unsplittable if a tensor's first dimension is not the number of rows.
    """
    if isinstance(output, Tensor):
        return _split_tensor(output, sizes)
    # most modules return (tensor,) with return_dict=False; pytree takes 1 us per call longer for it
    if type(output) is tuple and len(output) == 1 and isinstance(output[0], Tensor):
        return [(part,) for part in _split_tensor(output[0], sizes)]
    leaves, structure = tree_flatten(output, is_leaf=_has_own_split)
    columns = [_split_leaf(leaf, sizes) for leaf in leaves]
    return [tree_unflatten([column[i] for column in columns], structure) for i in range(len(sizes))]


def _has_own_split(node: Any) -> bool:
    return isinstance(node, RaggedList) or type(node).__name__.endswith("Cache")


def _split_leaf(leaf: Any, sizes: Sequence[int]) -> list[Any]:
    if isinstance(leaf, Tensor):
        return _split_tensor(leaf, sizes)
    if isinstance(leaf, RaggedList):
        return _split_ragged(leaf, sizes)
    if leaf is None or isinstance(leaf, SCALAR_TYPES):
        return [leaf] * len(sizes)
    if type(leaf).__name__.endswith("Cache"):
        return [None] * len(sizes)
    raise Unsplittable(f"an output of type {type(leaf).__name__} has no rows")


def _split_tensor(tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    total = sum(sizes)
    if tensor.ndim == 0 or tensor.shape[0] != total:
        raise Unsplittable(f"an output of shape {tuple(tensor.shape)} does not have {total} rows")
    if tensor.is_contiguous():
        return list(_split_copy(tensor, list(sizes)))
    return [part.clone() for part in tensor.split_with_sizes(list(sizes))]  # keeps the memory layout


def _split_ragged(ragged: RaggedList, sizes: Sequence[int]) -> list[RaggedList]:
    if len(ragged) != sum(sizes):
        raise Unsplittable(f"a list of {len(ragged)} tensors does not have {sum(sizes)} rows")
    copies = iter([tensor.clone() for tensor in ragged])
    return [RaggedList([next(copies) for _ in range(size)]) for size in sizes]


def _rows(tensor: Tensor, indices: tuple[int, ...], dim: int = 0) -> Tensor:
    """These rows of the tensor, copied. Not `tensor[indices]`: a GPU would wait for the list of numbers."""
    parts = []
    for first, count, repeats in _runs(indices):
        part = tensor.narrow(dim, first, count)
        if repeats > 1:
            part = part.expand(*(repeats if i == dim else -1 for i in range(tensor.ndim)))
        parts.append(part)
    return torch.cat(parts, dim)


@functools.lru_cache(1024)
def _runs(indices: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """The indices as (first, count, repeats): `count` ascending rows, or one row several times."""
    runs: list[tuple[int, int, int]] = []
    for index in indices:
        first, count, repeats = runs[-1] if runs else (index, 0, 1)
        if count == 1 and index == first:
            runs[-1] = (first, 1, repeats + 1)
        elif repeats == 1 and count and index == first + count:
            runs[-1] = (first, count + 1, 1)
        else:
            runs.append((index, 1, 1))
    return tuple(runs)


def _cat_timesteps(values: Sequence[Tensor], calls: Sequence[ModuleCall]) -> Tensor:
    """The timesteps of all rows as floats: (rows,), or (rows, tokens)."""
    rows = sum([call.batch_size for call in calls])
    dims = set(map(Tensor.dim, values))
    joined = None
    if dims == {0}:
        joined = torch.stack(list(values))
    elif 0 not in dims:
        joined = torch.cat(list(values))
    if joined is None or joined.shape[0] != rows:  # some calls have one timestep for several rows
        every = zip(values, calls, strict=True)
        return torch.cat([_timestep_rows(value, call.batch_size) for value, call in every])
    return joined if joined.is_floating_point() else joined.to(torch.float32)


def _timestep_rows(timestep: Tensor, batch_size: int) -> Tensor:
    """(B,) from a timestep of shape (), (1,) or (B,); (B, tokens) as it is. As floats."""
    if not timestep.is_floating_point():
        timestep = timestep.to(torch.float32)
    if timestep.ndim > 1 or (timestep.ndim == 1 and timestep.shape[0] == batch_size):
        return timestep
    return timestep.reshape(-1).expand(batch_size)


def _broadcast(value: Any, batch_size: int) -> Any:
    """The value with `batch_size` rows in each of its tensors."""
    return map_tensors(lambda t: t if t.shape[0] == batch_size else t.expand(batch_size, *t.shape[1:]), value)


def _cat(seam: Seam, key: Hashable, name: str, values: Sequence[Any]) -> Any:
    """The values as one, tensor by tensor. By hand: pytree would flatten every call's value separately."""
    first = values[0]
    if isinstance(first, Tensor):
        if name in LOOP_INVARIANT:
            return _stacked_constant(seam, key, name, values)
        return torch.cat(list(values))
    if isinstance(first, dict):
        return type(first)(
            (inner, None if item is None else _cat(seam, key, str(inner), [value[inner] for value in values]))
            for inner, item in first.items()
        )
    if isinstance(first, list | tuple):
        return type(first)(_cat(seam, key, "", column) for column in zip(*values, strict=True))
    return first


def _stacked_constant(seam: Seam, key: Hashable, name: str, values: Sequence[Tensor]) -> Tensor:
    """The stack of these tensors, made again only when they are not those of the last batch."""
    ids = list(map(id, values))
    known = seam.stacked_constants.get((key, name))
    if known is not None and known.ids == ids:
        return known.stacked

    def forget(_reference: object) -> None:
        seam.stacked_constants.pop((key, name), None)

    stacked = torch.cat(list(values))
    references = [weakref.ref(value, forget) for value in values]
    seam.stacked_constants[key, name] = StackedConstant(ids, references, stacked)
    return stacked
