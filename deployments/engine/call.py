"""One parked forward of one module: what it must share with others, how calls become one, and one many."""

from __future__ import annotations

import hashlib
import operator
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from deployments.engine.fiber import Fiber


class Kind(Enum):
    """What an argument has to do with the pictures of a call."""

    ROWS = "one entry per picture along dimension 0, also inside dicts, lists and tuples"
    SECOND = "a tensor with one entry per picture along dimension 1"
    ENTRIES = "a list with one tensor per picture"
    LAYOUT = "a list of plain layouts, the same for every picture; models read the first one"
    STEPS = "the time of each picture, or one for all; perhaps one per token, (rows, tokens)"
    SHARED = "tensors that serve the whole batch: calls match only if the values are equal"
    PLAIN = "no tensors: calls match only if they are equal"


# What the arguments of diffusers' and transformers' modules mean, by name. Guessing from shapes goes
# wrong (FLUX's img_ids are (S, 3): 64x96 and 96x64 pictures have equal shapes and different ids), so
# an argument that stands in no table and holds a tensor keeps its call out of every batch.
_NAMES: dict[Kind, str] = {
    Kind.ROWS: """
        hidden_states sample x z latents
        encoder_hidden_states encoder_hidden_states_mask encoder_attention_mask attention_mask
        encoder_hidden_states_image encoder_hidden_states_2 encoder_attention_mask_2
        encoder_hidden_states_t5 text_embedding_mask text_embedding_mask_t5 text_encoder_layers
        pooled_projections pooled_projection pooled_embeds text_embeds image_embeds clip_text
        clip_text_pooled clip_img proj_embedding
        guidance timestep_cond class_labels added_cond_kwargs time_ids added_time_ids image_meta_size style
        original_size target_size crop_coords condition_mask additional_t_cond
        controlnet_cond controlnet_mode control_type controlnet_block_samples
        controlnet_single_block_samples block_controlnet_hidden_states
        down_block_additional_residuals mid_block_additional_residual down_intrablock_additional_residuals
        audio_hidden_states audio_encoder_hidden_states audio_encoder_attention_mask video_coords audio_coords
        inpaint_latents control_latents control_hidden_states
        input_ids token_type_ids inputs_embeds
    """,
    Kind.SECOND: "encoder_hidden_states_llama3",
    Kind.ENTRIES: "cap_feats control_context",
    Kind.LAYOUT: "img_shapes",
    Kind.STEPS: """
        timestep timesteps t timestep_r r_timestep timestep_ratio audio_timestep sigma audio_sigma
    """,
    Kind.SHARED: """
        img_ids txt_ids image_rotary_emb rotary_emb freqs_cis latent_embeds visual_rope_pos text_rope_pos
        padding_mask ofs
    """,
}
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names.split()}
_OWN_KINDS: dict[tuple[str, str], Kind] = {  # where a module means something else than the others
    ("ZImageTransformer2DModel", "x"): Kind.ENTRIES,  # lists of (C, F, H, W), as are its captions
    ("ZImageControlNetModel", "x"): Kind.ENTRIES,
    ("Krea2Transformer2DModel", "position_ids"): Kind.SHARED,  # (S, 3); OmniGen's are rows and set a scale
    ("HiDreamImageTransformer2DModel", "img_ids"): Kind.ROWS,  # (B, S, 3), each picture's own
    ("SanaWMTransformer3DModel", "attention_mask"): Kind.PLAIN,
}

# Computed before the loop and only read in it; stacked once for as long as the same batch goes on.
# What a pipeline may write to in place (latents, timesteps) must not stand here.
_CONSTANT = frozenset(
    """
    encoder_hidden_states encoder_hidden_states_mask encoder_attention_mask encoder_hidden_states_image
    encoder_hidden_states_2 encoder_attention_mask_2 encoder_hidden_states_t5 encoder_hidden_states_llama3
    pooled_projections pooled_embeds text_embeds time_ids guidance
    """.split()
)

_PLAIN = (bool, int, float, str)
# its stub says that it gives back None
_split_copy: Callable[..., Sequence[Tensor]] = torch.split_with_sizes_copy  # type: ignore[assignment]


class Unsplittable(Exception):
    """The output has a tensor that belongs to no row; such a module runs call by call."""


class Entries(list[Any]):
    """An output list with one tensor per picture, to be told from a list of tensors of many rows."""


class Key:
    """What calls must have in common to share a forward. One object per seam and content: compare by `is`."""

    __slots__ = ("__weakref__", "parts")

    def __init__(self, parts: tuple[Hashable, ...]) -> None:
        self.parts = parts

    def __repr__(self) -> str:
        return f"Key{self.parts!r}"


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
            own = _OWN_KINDS.get((self.name.partition(".")[0], argument))
            known = self.kinds[argument] = own or _KINDS.get(argument, Kind.PLAIN)
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
    fiber.looks[seam] = (_look(seam, arguments, parts, rows, key), *recent[:1])
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
        if value is None or isinstance(value, _PLAIN):
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
    if output is None or isinstance(output, _PLAIN):
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
        if value is None or isinstance(value, _PLAIN):
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
                if value is None or isinstance(value, Tensor) or _part(kind, value, self.rows, fiber) != part:
                    return False
        except KeyError:
            return False
        return True

    def holding(self, arguments: Mapping[str, Any]) -> Look:
        """The same look with these objects to compare the next call's with."""
        return replace(self, held=self.kept(arguments))


def _look(
    seam: Seam, arguments: Mapping[str, Any], parts: Mapping[str, Hashable | None], rows: int, key: Key
) -> Look:
    """The look of a call whose arguments have these parts of the key."""
    kept: list[tuple[str, bool]] = []
    moving: list[tuple[str, torch.Size, torch.dtype]] = []
    inner: list[tuple[str, Kind, Hashable]] = []
    for name, value in arguments.items():
        kind = seam.kind(name)
        if value is None or isinstance(value, _PLAIN):
            kept.append((name, False))
        elif not isinstance(value, Tensor):
            inner.append((name, kind, parts[name]))
        elif kind is Kind.SHARED or name in _CONSTANT:
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
        elif isinstance(value, _PLAIN):
            parts[name] = (value,)
        else:
            part = parts[name] = _part(seam.kind(name), value, rows, fiber)
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


def _part(kind: Kind, value: Any, rows: int, fiber: Fiber) -> Hashable | None:
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
        return _remembered(seam, key, name, values) if name in _CONSTANT else torch.cat(list(values))
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
