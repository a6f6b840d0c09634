"""Many LoRAs in one forward: every row gets the low-rank product of its own adapters added, others nothing.

The layers stay as they are. A forward hook looks whose rows are being computed (engine/lora_rows.py) and
adds B (A x) to the rows of those who own adapters for this layer, as two batched products over all of
them. What a row gets depends on nothing but the row and its owner: ranks are padded to fixed sizes that
the owner alone decides, and (where the engine keeps to proven numbers of rows) a batched product is used
only for sizes in which a trial gave every row the bits that it has alone; else rows are computed one by
one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from deployments.engine.call import Unsplittable
from deployments.engine.lora_rows import LoraRows, current_lora_rows
from deployments.loras.source import LowRankFactors

LayerKey = tuple[str, str]  # part of the pipeline, path of the layer in it

RANKS = (8, 16, 32, 64, 128, 256, 512)  # what the ranks of a request's adapters together are padded to
COMPOSITIONS_KEPT = 4  # of batches: transformer and text encoders, with and without one request
TRIALS_KEPT = 4096
TRIALS = 64  # at most, of one size
VALUES_TO_BELIEVE = 2**20  # compared, before 16-bit products are taken for independent of their neighbours


@dataclass(frozen=True, slots=True)
class LowRankPair:
    """What one request adds to one layer: b @ (a @ x). a: (R, in) or (R, in, kh, kw); b: (out, R)."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LoraSet:
    """The adapters of a request with its weights: the owner of its rows."""

    pairs: Mapping[LayerKey, LowRankPair]
    label: Hashable = ()  # adapters and weights by name: equal ones change the same

    @property
    def touches_text(self) -> bool:
        """Whether prompts mean something else with it."""
        return any(part.startswith("text_encoder") for part, _ in self.pairs)


def mix(adapters: Sequence[tuple[Mapping[LayerKey, LowRankFactors], float]], label: Hashable = ()) -> LoraSet:
    """Adapters on the device and their weights as one: ranks side by side, weights and alphas in b."""
    places: dict[LayerKey, list[tuple[LowRankFactors, float]]] = {}
    for factors, weight in adapters:
        for place, one in factors.items():
            places.setdefault(place, []).append((one, weight * one.scale))
    return LoraSet({place: _joined(parts) for place, parts in places.items()}, label)


def _joined(parts: Sequence[tuple[LowRankFactors, float]]) -> LowRankPair:
    bs = [one.b if scale == 1 else (one.b.float() * scale).to(one.b.dtype) for one, scale in parts]
    a, b = parts[0][0].a, bs[0]
    if len(parts) > 1:
        a, b = torch.cat([one.a for one, _ in parts]), torch.cat(bs, dim=1)
    missing = next(rank for rank in RANKS if rank >= a.shape[0]) - a.shape[0]
    if missing:
        a = torch.cat([a, a.new_zeros(missing, *a.shape[1:])])
        b = functional.pad(b, (0, missing))
    return LowRankPair(a, b)


class BatchedLora:
    """The hooks on one model's layers. `hook` and `restore` run on the engine's thread, as forwards do."""

    def __init__(self, parts: Mapping[str, nn.Module], *, deterministic: bool) -> None:
        """parts: the pipeline's modules by name. deterministic: bits must not depend on neighbours."""
        self._parts = parts
        self._alike = _Alike() if deterministic else None
        self._hooks: dict[LayerKey, Callable[[], None]] = {}
        self._compositions: OrderedDict[tuple[Hashable | None, ...], _Composition] = OrderedDict()
        self._lock = threading.Lock()  # of the compositions: `forget` comes from another thread

    def hook(self, places: Iterable[LayerKey]) -> None:
        """Have these layers look for adapters; layers that no adapter changes stay untouched."""
        for place in places:
            if place not in self._hooks:
                part, path = place
                layer = self._parts[part].get_submodule(path)
                look = partial(self._look, place)
                self._hooks[place] = layer.register_forward_hook(look).remove

    def has_hooks(self, places: Iterable[LayerKey]) -> bool:
        return all(place in self._hooks for place in places)

    def restore(self) -> None:
        """Take all hooks off; the layers are as they were."""
        for remove in self._hooks.values():
            remove()
        self._hooks.clear()
        with self._lock:
            self._compositions.clear()

    def forget(self, owner: LoraSet) -> None:
        """Free what was stacked for batches with this owner."""
        with self._lock:
            for owners in [owners for owners in self._compositions if owner in owners]:
                del self._compositions[owners]

    @property
    def stacked_bytes(self) -> int:
        """Memory of the stacks of the last batches."""
        with self._lock:
            return sum(composition.size_bytes for composition in self._compositions.values())

    def _look(
        self, place: LayerKey, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        rows = current_lora_rows()
        if rows is None:
            return None
        if rows.cache is None:
            rows.cache = self._composition(rows)
        groups = rows.cache.at(place)
        if not groups:
            return None
        return _added(groups, len(rows.lora_sets), layer, inputs[0], output, self._alike)

    def _composition(self, rows: LoraRows) -> _Composition:
        with self._lock:
            known = self._compositions.get(rows.lora_sets)
            if known is None:
                known = self._compositions[rows.lora_sets] = _Composition(rows.lora_sets)
                if len(self._compositions) > COMPOSITIONS_KEPT:
                    self._compositions.popitem(last=False)
            self._compositions.move_to_end(rows.lora_sets)
            return known


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows of one rank: all that one batched product computes."""

    rows: slice | Tensor  # a slice where they lie together, else indices (n,)
    count: int
    a: Tensor  # (n, R, in) or (n, R, in, kh, kw)
    b: Tensor  # (n, out, R)


@dataclass(slots=True)
class _Composition:
    """Stacked factors of one batch, made layer by layer when first needed."""

    owners: tuple[Hashable | None, ...]
    groups: dict[LayerKey, list[_Group]] = field(default_factory=dict)

    def at(self, place: LayerKey) -> list[_Group]:
        known = self.groups.get(place)
        if known is None:
            known = self.groups[place] = self._stack(place)
        return known

    @property
    def size_bytes(self) -> int:
        tensors = [t for groups in list(self.groups.values()) for group in groups for t in (group.a, group.b)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _stack(self, place: LayerKey) -> list[_Group]:
        by_rank: dict[int, list[tuple[int, LowRankPair]]] = {}
        for row, owner in enumerate(self.owners):
            pair = owner.pairs.get(place) if isinstance(owner, LoraSet) else None
            if pair is not None:
                by_rank.setdefault(pair.a.shape[0], []).append((row, pair))
        return [_group(members) for members in by_rank.values()]


def _group(members: Sequence[tuple[int, LowRankPair]]) -> _Group:
    rows = [row for row, _ in members]
    a, b = torch.stack([pair.a for _, pair in members]), torch.stack([pair.b for _, pair in members])
    together = rows[-1] - rows[0] == len(rows) - 1
    where = slice(rows[0], rows[-1] + 1) if together else torch.tensor(rows, device=a.device)
    return _Group(where, len(rows), a, b)


def _added(
    groups: Sequence[_Group], total: int, layer: nn.Module, x: Tensor, output: Tensor, alike: _Alike | None
) -> Tensor:
    """The layer's output with each group's products added to its rows; no other row is written.

    x: (total * k, ...): video models fold k frames into each row, a row's frames side by side.
    """
    if x.shape[0] % total or output.shape[0] != x.shape[0]:
        raise Unsplittable(f"{x.shape[0]} rows inside for {total} outside; whose they are cannot be told")
    output = output.contiguous()
    out = output.view(total, output.shape[0] // total, *output.shape[1:])
    x = x.reshape(total, x.shape[0] // total, *x.shape[1:])
    add = _add_convolution if isinstance(layer, nn.Conv2d) else _add_linear
    for group in groups:
        together = alike is None or alike.holds(add, layer, out, x, group)
        mine, own = out[group.rows], x[group.rows]  # views where rows lie together, else copies
        if together:
            add(layer, mine, own, group.a, group.b)
        else:
            for i in range(group.count):
                add(layer, *(part[i : i + 1] for part in (mine, own, group.a, group.b)))
        if not isinstance(group.rows, slice):
            out.index_copy_(0, group.rows, mine)
    return output


_Add = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], None]


def _add_linear(_layer: nn.Module, out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> None:
    """out (n, k, ..., out) += b @ a @ x for x (n, k, ..., in), a (n, R, in), b (n, out, R).

    Adding within the second product saves a pass over the output: a quarter of the cost. The first one with x
    on the right is up to a tenth faster than with x on the left.
    """
    n = x.shape[0]
    inner = torch.bmm(a, x.reshape(n, -1, x.shape[-1]).contiguous().transpose(1, 2))  # (n, R, k * ...)
    out.view(n, -1, out.shape[-1]).baddbmm_(inner.transpose(1, 2), b.transpose(1, 2))


def _add_convolution(layer: nn.Module, out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> None:
    """out (n, k, out, H', W') += b of the convolution of x (n, k, in, H, W) with a (n, R, in, kh, kw).

    Rows are the groups of one convolution; b is (n, out, R).
    """
    assert isinstance(layer, nn.Conv2d), "chosen by the caller"
    n, k, channels = x.shape[:3]
    folded = x.transpose(0, 1).reshape(k, n * channels, *x.shape[3:]).contiguous()
    inner = functional.conv2d(
        folded, a.flatten(0, 1), None, layer.stride, layer.padding, layer.dilation, groups=n
    )  # (k, n * R, H', W')
    height, width = inner.shape[2:]
    inner = inner.reshape(k, n, -1, height * width).transpose(0, 1).contiguous()  # (n, k, R, H' * W')
    if k == 1:
        out.view(n, -1, height * width).baddbmm_(b, inner[:, 0])
    else:
        out += torch.matmul(b[:, None], inner).view(out.shape)


class _Alike:
    """Which batched products give every row the bits that it has alone: tried with noise, once per size."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, bool] = OrderedDict()

    def holds(self, add: _Add, layer: nn.Module, out: Tensor, x: Tensor, group: _Group) -> bool:
        if group.count == 1:
            return True
        if isinstance(layer, nn.Conv2d):  # one group and several take different ways through a convolution
            return False
        key = (out.shape[1:], x.shape[1:], x.dtype, x.device, group.a.shape, group.b.shape)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _tried(add, layer, out, x, group)
            if len(self._known) > TRIALS_KEPT:
                self._known.popitem(last=False)
        return known


def _tried(add: _Add, layer: nn.Module, out: Tensor, x: Tensor, group: _Group) -> bool:
    """Whether rows together have the bits of each alone, in as much noise as it takes to be sure.

    In float32 another order of summing shows at once. Rounding to 16 bits hides it in all but one value of
    some 50,000: what is too small to show that many runs row by row.
    """
    n, generator = group.count, torch.Generator(x.device).manual_seed(0)

    def noise(shape: Iterable[int]) -> Tensor:
        return torch.randn(*shape, generator=generator, device=x.device).to(x.dtype)

    compared, enough = 0, 1 if x.dtype is torch.float32 else VALUES_TO_BELIEVE
    for _ in range(TRIALS):
        together = noise((n, *out.shape[1:]))
        apart = together.clone()
        rest = [noise((n, *x.shape[1:])), noise(group.a.shape), noise(group.b.shape)]
        add(layer, together, *rest)
        for i in range(n):
            add(layer, *(part[i : i + 1] for part in (apart, *rest)))
        if not torch.equal(together, apart):
            return False
        compared += together.numel()
        if compared >= enough:
            return True
    return False
