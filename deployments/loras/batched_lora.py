"""Many LoRAs in one forward pass: every row gets the low-rank product of its own LoRA set, other rows
nothing.

The weights are not changed. A forward hook on each layer reads which LoRA set each row of the batch has
(engine/lora_rows.py) and adds b @ (a @ x) to those rows, as two batched products over all rows of one rank
(compare S-LoRA, arXiv 2311.03285, and Punica, arXiv 2310.18547). The result for a row depends on the row and
its LoRA set only: ranks are padded to fixed sizes that the set alone decides, and, in deterministic mode, a
batched product is used only for sizes in which a trial gave every row the bits that it gets alone; else rows
are computed one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from cachetools import LRUCache
from torch import Tensor, nn

from deployments.engine.lora_rows import LoraRows, current_lora_rows
from deployments.engine.stacking import Unsplittable
from deployments.loras.lora_set import LoraSet, LowRankPair
from deployments.loras.low_rank_products import BatchInvariance, RowGroup, add_convolution, add_linear
from deployments.loras.source import LayerKey

# batches whose stacks are kept: of transformer and text encoders, with and without one request
MAX_COMPOSITIONS = 4

Composition = tuple[Hashable | None, ...]  # the LoRA set of every row of a batch; None for a row without one


class BatchedLora:
    """The forward hooks on one model's layers. `hook` and `unhook` run on the engine's thread, as forwards
    do."""

    def __init__(self, parts: Mapping[str, nn.Module], *, deterministic: bool) -> None:
        """parts: the pipeline's modules by name. deterministic: a row's bits do not depend on other rows."""
        self._parts = parts
        self._invariance = BatchInvariance() if deterministic else None
        self._hooks: dict[LayerKey, Callable[[], None]] = {}
        self._stacks: LRUCache[Composition, _StackedFactors] = LRUCache(MAX_COMPOSITIONS)
        self._lock = threading.Lock()  # of the stacks: `forget` is called from another thread

    def hook(self, layers: Iterable[LayerKey]) -> None:
        """Have these layers add low-rank products; layers that no LoRA changes have no hook and no cost."""
        for key in layers:
            if key not in self._hooks:
                part, path = key
                layer = self._parts[part].get_submodule(path)
                self._hooks[key] = layer.register_forward_hook(partial(self._after_forward, key)).remove

    def has_hooks(self, layers: Iterable[LayerKey]) -> bool:
        """Whether all these layers have hooks."""
        return all(key in self._hooks for key in layers)

    def unhook(self) -> None:
        """Remove all hooks and free all stacks."""
        for remove in self._hooks.values():
            remove()
        self._hooks.clear()
        with self._lock:
            self._stacks.clear()

    def forget(self, lora_set: LoraSet) -> None:
        """Free the stacks of batches that contained this LoRA set."""
        with self._lock:
            for composition in [composition for composition in self._stacks if lora_set in composition]:
                del self._stacks[composition]

    @property
    def stacked_bytes(self) -> int:
        """Device memory of the stacks of the last batches."""
        with self._lock:
            return sum(stacks.size_bytes for stacks in self._stacks.values())

    def _after_forward(
        self, key: LayerKey, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        rows = current_lora_rows()
        if rows is None:
            return None
        if rows.cache is None:
            rows.cache = self._stacks_for(rows)
        groups = rows.cache.groups_of(key)
        if not groups:
            return None
        return _add_products(groups, len(rows.lora_sets), layer, inputs[0], output, self._invariance)

    def _stacks_for(self, rows: LoraRows) -> _StackedFactors:
        with self._lock:
            stacks = self._stacks.get(rows.lora_sets)
            if stacks is None:
                stacks = self._stacks[rows.lora_sets] = _StackedFactors(rows.lora_sets)
            return stacks


@dataclass(slots=True)
class _StackedFactors:
    """The stacked factors of one batch, built layer by layer on first use."""

    composition: Composition
    groups: dict[LayerKey, list[RowGroup]] = field(default_factory=dict)

    def groups_of(self, key: LayerKey) -> list[RowGroup]:
        """One group per rank that occurs in this layer; empty where no row changes it."""
        groups = self.groups.get(key)
        if groups is None:
            groups = self.groups[key] = self._build(key)
        return groups

    @property
    def size_bytes(self) -> int:
        """Device memory of the stacks."""
        tensors = [t for groups in list(self.groups.values()) for group in groups for t in (group.a, group.b)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _build(self, key: LayerKey) -> list[RowGroup]:
        by_rank: dict[int, list[tuple[int, LowRankPair]]] = {}
        for row, lora_set in enumerate(self.composition):
            pair = lora_set.pairs.get(key) if isinstance(lora_set, LoraSet) else None
            if pair is not None:
                by_rank.setdefault(pair.a.shape[0], []).append((row, pair))
        return [_group(members) for members in by_rank.values()]


def _group(members: Sequence[tuple[int, LowRankPair]]) -> RowGroup:
    rows = [row for row, _ in members]
    a, b = torch.stack([pair.a for _, pair in members]), torch.stack([pair.b for _, pair in members])
    adjacent = rows[-1] - rows[0] == len(rows) - 1
    where = slice(rows[0], rows[-1] + 1) if adjacent else torch.tensor(rows, device=a.device)
    return RowGroup(where, len(rows), a, b)


def _add_products(
    groups: Sequence[RowGroup],
    batch_size: int,
    layer: nn.Module,
    x: Tensor,
    output: Tensor,
    invariance: BatchInvariance | None,
) -> Tensor:
    """The layer's output with each group's products added to its rows; no other row is written.

    x: (batch_size * k, ...), output likewise: video models fold k frames into each row, the frames of a row
    adjacent. Raises Unsplittable where the first dimension is no multiple of the batch size.
    """
    if x.shape[0] % batch_size or output.shape[0] != x.shape[0]:
        raise Unsplittable(
            f"a layer got {x.shape[0]} rows of a batch of {batch_size}; they cannot be assigned to requests"
        )
    output = output.contiguous()
    out = output.view(batch_size, output.shape[0] // batch_size, *output.shape[1:])
    x = x.reshape(batch_size, x.shape[0] // batch_size, *x.shape[1:])
    add = add_convolution if isinstance(layer, nn.Conv2d) else add_linear
    for group in groups:
        at_once = invariance is None or invariance.holds(add, layer, out, x, group)
        own_out, own_x = out[group.rows], x[group.rows]  # views of adjacent rows, else copies
        if at_once:
            add(layer, own_out, own_x, group.a, group.b)
        else:
            for i in range(group.count):
                add(layer, *(part[i : i + 1] for part in (own_out, own_x, group.a, group.b)))
        if not isinstance(group.rows, slice):
            out.index_copy_(0, group.rows, own_out)
    return output
