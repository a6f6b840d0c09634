"""One parked forward of one module: what it must share with others, how calls become one, and one many."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deployments.engine.fiber import Fiber

# What the arguments of diffusers' and transformers' modules mean, by name. Guessing from shapes goes
# wrong (FLUX's img_ids are (S, 3): 64x96 and 96x64 pictures have equal shapes and different ids), so
# an argument that stands in no table keeps its call out of every batch.
ROWS = frozenset(  # one entry per picture along dimension 0; also inside dicts, lists and tuples
    """
    hidden_states sample encoder_hidden_states encoder_hidden_states_mask encoder_attention_mask
    attention_mask pooled_projections pooled_projection guidance timestep_cond class_labels
    encoder_hidden_states_image added_cond_kwargs text_embeds time_ids image_embeds
    controlnet_cond controlnet_block_samples controlnet_single_block_samples
    down_block_additional_residuals mid_block_additional_residual down_intrablock_additional_residuals
    input_ids token_type_ids inputs_embeds z x
    """.split()
)
STEPS = frozenset({"timestep", "timesteps"})  # one number per picture, or one 0-d tensor for all
SHARED = frozenset(  # one tensor for the whole batch: calls match only if the values are equal
    "img_ids txt_ids position_ids image_rotary_emb rotary_emb freqs_cis latent_embeds".split()
)


_PLAIN = (bool, int, float, str)


class Unsplittable(Exception):
    """The output has a tensor that belongs to no row; such a module runs call by call."""


@dataclass(frozen=True, slots=True)
class Seam:
    """One interceptable function of a module: the forward of a transformer, the decode of a VAE."""

    name: str  # for logs and metrics, such as "FluxTransformer2DModel.forward"
    function: Callable[..., Any]  # the module's own bound function
    positions: tuple[str, ...]  # parameter names in order
    mergeable: bool = True  # False: stateful or unknown; its calls never share a forward


@dataclass(slots=True)
class ModuleCall:
    """A call of a seam with named arguments. Changed by nobody once it is parked."""

    seam: Seam
    arguments: dict[str, Any]
    rows: int  # pictures in it along dimension 0
    key: Hashable | None  # calls with equal keys fit into one forward; None fits with nobody

    def run(self) -> Any:
        """The module's own answer to this call alone, bit for bit what the pipeline would get."""
        return self.seam.function(**self.arguments)


def make_call(seam: Seam, fiber: Fiber, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ModuleCall:
    """The call with every argument named and its compatibility key worked out."""
    arguments = dict(zip(seam.positions, args, strict=False))
    arguments.update(kwargs)
    rows = _row_count(arguments)
    key = _key(seam, arguments, rows, fiber) if seam.mergeable and rows else None
    return ModuleCall(seam, arguments, rows or 1, key)


def stack(calls: Sequence[ModuleCall]) -> dict[str, Any]:
    """Arguments of one forward for all `calls`, which share a key: rows in the order of the calls."""
    first = calls[0].arguments
    if len(calls) == 1:
        return first
    merged: dict[str, Any] = {}
    for name, value in first.items():
        if name in STEPS and isinstance(value, Tensor):
            merged[name] = torch.cat([_per_row(call.arguments[name], call.rows) for call in calls])
        elif name in ROWS:
            merged[name] = _cat([call.arguments[name] for call in calls])
        else:
            merged[name] = value
    return merged


def split(output: Any, sizes: Sequence[int]) -> list[Any]:
    """The output's rows dealt back to calls of `sizes` rows, each in memory of its own.

    Copies, not views: a view of one row would keep the whole batch's output alive.
    Raises Unsplittable if a tensor's first dimension is not the number of rows.
    """
    total = sum(sizes)
    if isinstance(output, Tensor):
        if output.ndim == 0 or output.shape[0] != total:
            raise Unsplittable(f"an output of shape {tuple(output.shape)} has not {total} rows")
        return [part.clone() for part in output.split(list(sizes))]
    if output is None or isinstance(output, _PLAIN):
        return [output] * len(sizes)
    if isinstance(output, Mapping):  # transformers' ModelOutput and diffusers' BaseOutput are dicts
        parts = {name: split(value, sizes) for name, value in output.items()}
        make = type(output)
        return [make(**{name: part[i] for name, part in parts.items()}) for i in range(len(sizes))]
    if isinstance(output, list | tuple):
        columns = [split(value, sizes) for value in output]
        return [type(output)(column[i] for column in columns) for i in range(len(sizes))]
    raise Unsplittable(f"an output of type {type(output).__name__} has no rows")


def _row_count(arguments: Mapping[str, Any]) -> int:
    """Rows of the first row-wise tensor argument, 0 if there is none."""
    for name, value in arguments.items():
        if name in ROWS and isinstance(value, Tensor) and value.ndim:
            return int(value.shape[0])
    return 0


def _key(seam: Seam, arguments: Mapping[str, Any], rows: int, fiber: Fiber) -> Hashable | None:
    """What calls must have in common to share a forward; None if this one can share none.

    Most arguments are the very objects of the fiber's last call (prompt embeddings, ids): their parts
    of the key are kept.
    """
    parts: list[Hashable] = [id(seam)]
    for name, value in arguments.items():
        if value is None:
            continue  # a missing argument and a None one are the same
        if isinstance(value, _PLAIN):
            parts.append((name, value))
            continue
        last = fiber.parts.get(name)
        if last is not None and last[0] is value and last[1] == rows:
            parts.append(last[2])
            continue
        part = _part(name, value, rows, fiber)
        if part is None:
            return None
        if isinstance(value, Tensor):  # a dict or list may have changed inside
            fiber.parts[name] = (value, rows, (name, part))
        parts.append((name, part))
    return tuple(parts)


def _part(name: str, value: Any, rows: int, fiber: Fiber) -> Hashable | None:
    if name in STEPS:
        return _steps_key(value, rows)
    if name in ROWS:
        return _rows_key(value, rows)
    if name in SHARED:
        return _shared_key(value, fiber)
    return _plain_key(value)


def _steps_key(value: Any, rows: int) -> Hashable | None:
    if (
        not isinstance(value, Tensor)
        or value.ndim > 1
        or (value.ndim == 1 and value.shape[0] not in (1, rows))
    ):
        return None
    # integer timesteps (DDIM) and float ones (Euler) meet as float32: every model converts them so itself
    return (value.dtype if value.is_floating_point() else torch.float32, value.device)


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
    return None if any(part is None for _, part in parts) else tuple(parts)


def _shared_key(value: Any, fiber: Fiber) -> Hashable | None:
    """The value itself, as a digest; each tensor is hashed once per fiber, as hashing reads the device."""
    if isinstance(value, tuple | list):
        parts = tuple(_shared_key(item, fiber) for item in value)
        return None if None in parts else parts
    if not isinstance(value, Tensor):
        return None
    known = fiber.digests.get(id(value))
    if known is None:
        data = value.detach().contiguous().cpu().view(torch.uint8).numpy()
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


def _per_row(timestep: Tensor, rows: int) -> Tensor:
    """(rows,) from a 0-d, one-entry or per-row timestep."""
    if not timestep.is_floating_point():
        timestep = timestep.to(torch.float32)
    return timestep.reshape(-1).expand(rows)


def _cat(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if isinstance(first, Mapping):
        return {name: _cat([value[name] for value in values]) for name in first}
    if isinstance(first, list | tuple):
        return type(first)(_cat(column) for column in zip(*values, strict=True))
    return first
