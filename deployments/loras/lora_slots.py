"""The factors of a batch's LoRA sets side by side on the device: a slot for each, changed in place."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from deployments.lora_format.layer_names import LayerKey
from deployments.loras.layer_change import LowRankFactors
from deployments.loras.lora_set import LoraSet, LowRankSum

MAX_KEPT = 4  # batches: of transformer and text encoders, of two sizes
MAX_PER_SIZE = 2  # of them with one number of slots in one part
MAX_KEPT_BYTES = 2**31  # of all but the current one

Groups = Mapping[LayerKey, Sequence[LayerKey]]  # the layers that read the same input, by each of them


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """What decides the shapes of a block: batches with equal plans may use it one after the other."""

    layers: tuple[LayerKey, ...]  # those with outputs of one width are adjacent
    slots: tuple[int, ...]  # of the batch, those whose sets change these layers
    ranks: tuple[int, ...]  # of these slots, the same in all layers


@dataclass(slots=True)
class Block:
    """The factors of one layer, or of several that read the same input and are changed by the same slots.

    Ranks are padded with zeros to that of the largest.
    """

    plan: BlockPlan
    a: Tensor  # (S, R, M, in) of M Linear layers, (S, R, 1, in, kh, kw) of a Conv2d
    b: list[Tensor]  # for each class of layers with outputs of one width (C, S, R, out)
    places: dict[LayerKey, tuple[int, int]]  # class of a layer, and its index in the class

    @classmethod
    def empty(cls, plan: BlockPlan, factors: Sequence[LowRankFactors]) -> Block:
        """Factors that are not written yet. factors: some for each layer, of any slot."""
        widths = [one.b.shape[0] for one in factors]
        places, sizes, classes = {}, [0] * len(set(widths)), list(dict.fromkeys(widths))
        for key, width in zip(plan.layers, widths, strict=True):
            index = classes.index(width)
            places[key] = (index, sizes[index])
            sizes[index] += 1
        slots, rank = len(plan.slots), max(plan.ranks)
        like = factors[0].a
        empty = partial(torch.empty, dtype=like.dtype, device=like.device)
        a = empty((slots, rank, len(plan.layers), *like.shape[1:]))
        b = [empty((size, slots, rank, width)) for size, width in zip(sizes, classes, strict=True)]
        return cls(plan, a, b, places)

    @property
    def size_bytes(self) -> int:
        """Device memory of the factors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.a, *self.b))


@dataclass(slots=True)
class _Writes:
    """What has to be written into blocks: three calls for all layers, not some for each of hundreds."""

    zeroed: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    sources: list[Tensor] = field(default_factory=list)
    scaled: list[Tensor] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    rescaled: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of a DoRA: a target, its factors

    def add(self, block: Block, slot: int, key: LayerKey, total: LowRankSum) -> None:
        """slot: index in the block. The ranks of the parts stand side by side: they add up."""
        index, member = block.places[key]
        a, b = block.a[slot, :, block.plan.layers.index(key)], block.b[index][member, slot]
        done = 0
        for part in total.parts:
            rows = slice(done, done + part.a.shape[0])
            self.targets += [a[rows], b[rows]]
            self.sources += [part.a, part.b.t()]
            if part.scale != 1:
                self.scaled.append(b[rows])
                self.scales.append(part.scale)
            if part.row_scale is not None:
                self.rescaled.append((b[rows], part.row_scale))
            if part.column_scale is not None:
                columns = part.column_scale.view(-1, *(1 for _ in part.a.shape[2:]))
                self.rescaled.append((a[rows], columns))
            done = rows.stop
        if done < a.shape[0]:
            self.zeroed += [a[done:], b[done:]]

    def run(self) -> None:
        if self.zeroed:
            torch._foreach_zero_(self.zeroed)
        if self.targets:
            torch._foreach_copy_(self.targets, self.sources)
        if self.scaled:  # 16-bit values are multiplied in float32 and rounded once
            torch._foreach_mul_(self.scaled, self.scales)
        for target, factors in self.rescaled:
            target.mul_(factors)


class LoraSlots:
    """The factors of one batch in one part of the model."""

    def __init__(
        self,
        part: str,
        sets: Sequence[LoraSet],
        layers: Iterable[LayerKey],
        groups: Groups,
        old: LoraSlots | None = None,
    ) -> None:
        """sets: one for each slot. layers: those of the part that may be changed. old: slots that are not
        used any more; their memory is taken over, and what they hold of the same sets is not written again.
        """
        self.part = part
        self.sets: list[LoraSet | None] = list(sets)  # None: its request has ended
        self.groups = groups
        self._blocks: dict[LayerKey, Block] = {}
        writes = _Writes()
        for plan in self._plans(layers, groups):
            block = old.block(plan.layers[0]) if old is not None else None
            kept = block is not None and block.plan == plan
            if block is None or not kept:
                block = Block.empty(plan, [self._factors(plan.slots[0], key).parts[0] for key in plan.layers])
            for index, slot in enumerate(plan.slots):
                if kept and old is not None and old.sets[slot] is self.sets[slot]:
                    continue
                for key in plan.layers:
                    writes.add(block, index, key, self._factors(slot, key))
            self._blocks |= dict.fromkeys(plan.layers, block)
        writes.run()

    def block(self, layer: LayerKey) -> Block | None:
        """The factors for this layer; None where no set of the batch changes it."""
        return self._blocks.get(layer)

    def holds(self, sets: Sequence[LoraSet]) -> int:
        """How many of these sets are in their slots."""
        return sum(own is other for own, other in zip(self.sets, sets, strict=True))

    @property
    def size_bytes(self) -> int:
        """Device memory of the factors."""
        return sum(
            block.size_bytes for block in {id(block): block for block in self._blocks.values()}.values()
        )

    def _factors(self, slot: int, key: LayerKey) -> LowRankSum:
        lora_set = self.sets[slot]
        assert lora_set is not None, "sets end after they were written"
        return lora_set.layers[key]

    def _plans(self, layers: Iterable[LayerKey], groups: Groups) -> Iterator[BlockPlan]:
        """Layers of a group that the same slots change with the same ranks share a block."""
        planned: set[LayerKey] = set()
        for key in layers:
            if key in planned:
                continue
            members: dict[tuple[tuple[int, ...], tuple[int, ...]], list[LayerKey]] = {}
            for member in groups.get(key, (key,)):
                slots = tuple(
                    i for i, one in enumerate(self.sets) if one is not None and member in one.layers
                )
                ranks = tuple(self._factors(slot, member).rank for slot in slots)
                members.setdefault((slots, ranks), []).append(member)
                planned.add(member)
            yield from (BlockPlan(tuple(keys), *same) for same, keys in members.items() if same[0])


class KeptSlots:
    """The slots of the latest batches. `forget` may be called from any thread, the rest from the engine's."""

    def __init__(self) -> None:
        self._kept: list[LoraSlots] = []  # the least recently used first
        self._lock = threading.Lock()

    def get(
        self, part: str, sets: Sequence[LoraSet], layers: Iterable[LayerKey], groups: Groups
    ) -> LoraSlots:
        """Slots with these sets. Where none are kept, those of as many sets that hold most of them are
        changed in place, once there are two of that number: batches of two sizes may take turns."""
        with self._lock:
            self._kept = [one for one in self._kept if one.part != part or one.groups is groups]
            candidates = [one for one in self._kept if one.part == part and len(one.sets) == len(sets)]
            best = max(candidates, key=lambda one: one.holds(sets), default=None)
            if best is not None and best.holds(sets) == len(sets):
                self._kept.remove(best)
                self._kept.append(best)
                return best
            old = (
                best if best is not None and (None in best.sets or len(candidates) >= MAX_PER_SIZE) else None
            )
            if old is not None:
                self._kept.remove(old)
            slots = LoraSlots(part, sets, layers, groups, old)
            self._kept.append(slots)
            while len(self._kept) > MAX_KEPT or (len(self._kept) > 1 and self._bytes() > MAX_KEPT_BYTES):
                del self._kept[0]
            return slots

    def forget(self, lora_set: LoraSet) -> None:
        """Let the slots of this set be used for others, and free those of which no set is left."""
        with self._lock:
            for slots in self._kept:
                slots.sets = [None if one is lora_set else one for one in slots.sets]
            self._kept = [slots for slots in self._kept if any(one is not None for one in slots.sets)]

    def clear(self) -> None:
        """Free all."""
        with self._lock:
            self._kept.clear()

    @property
    def size_bytes(self) -> int:
        """Device memory of all slots."""
        with self._lock:
            return self._bytes()

    def _bytes(self) -> int:
        return sum(slots.size_bytes for slots in self._kept)
