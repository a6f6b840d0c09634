"""One forward of a batch whose rows have LoRAs: its layers with the products of every row."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import gcd

from torch import Tensor, nn

from deployments.engine.stacking import Unsplittable
from deployments.lora_format.layer_names import LayerKey
from deployments.loras.joint_linear import JointProofs, LoraLayer, can_be_joined, joint_outputs
from deployments.loras.lora_set import LoraSet
from deployments.loras.lora_slots import Block, KeptSlots, LoraSlots
from deployments.loras.low_rank_products import (
    BatchInvariance,
    Products,
    add_convolution,
    add_linear,
    add_linear_one_by_one,
)
from deployments.loras.row_changes import RowChanges
from deployments.loras.shared_inputs import InputRecorder, SharedInputs


@dataclass(frozen=True, slots=True)
class LoraModel:
    """What forwards share: the layers of a model that LoRAs may change, and what was learnt of them."""

    invariance: BatchInvariance | None  # None: bits may depend on other rows
    joints: JointProofs = field(default_factory=JointProofs)
    layers: dict[LayerKey, LoraLayer] = field(default_factory=dict)
    slots: KeptSlots = field(default_factory=KeptSlots)
    shared: SharedInputs = field(default_factory=SharedInputs)


@dataclass(frozen=True, slots=True)
class Unit:
    """Adjacent rows with the same LoRA set: what a slot's factors are multiplied with."""

    lora_set: LoraSet
    start: int
    rows: int


@dataclass(frozen=True, slots=True)
class SlotRun:
    """Slots of a block with adjacent rows, as many for each."""

    first: int  # of the block's slots
    end: int
    start: int  # row
    stop: int


class LoraForward:
    """Lives as long as the forward; holds what one layer computed for others."""

    def __init__(self, model: LoraModel, lora_sets: Sequence[Hashable | None]) -> None:
        """lora_sets: of every row."""
        self._model = model
        self._batch_size = len(lora_sets)
        self._units = units_of(lora_sets)
        self._row_changes = RowChanges(
            self._batch_size, [(unit.lora_set, unit.start, unit.rows) for unit in self._units]
        )
        self._parts: dict[str, tuple[LoraSlots, InputRecorder | None]] = {}
        self._runs: dict[tuple[int, ...], list[SlotRun]] = {}
        self._ready: dict[LayerKey, tuple[Tensor, Tensor]] = {}  # input and output
        self._activations: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the input, which is kept

    def activation(self, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The activation of x, the same tensor each time: its readers are recognised by it.

        Modulations of all blocks activate one embedding each for itself.
        """
        known = self._activations.get(id(x))
        if known is None:
            known = self._activations[id(x)] = (x, plain(x))
        return known[1]

    def layer(self, layer: LoraLayer, x: Tensor) -> Tensor:
        """The layer's output with the products added to the rows that have LoRAs for it."""
        key = layer.key
        ready = self._ready.pop(key, None)
        if ready is not None:
            if ready[0] is x:
                return ready[1]
            self._model.shared.separate(key)
        slots, recorder = self._parts.get(key[0]) or self._begin(key[0])
        if recorder is not None and isinstance(layer.module, nn.Linear):
            recorder.note(key, x)
        block = slots.block(key)
        if block is None:
            return self._plain(layer, x)
        self._check_rows(x)
        if isinstance(layer.module, nn.Conv2d):
            return self._convolution(layer, layer.module, block, x)
        if ready is None and len(block.plan.layers) > 1:
            layers = [self._model.layers[one] for one in block.plan.layers]
            if can_be_joined(layers, x) and (
                self._model.invariance is None or self._model.joints.holds(layers, x)
            ):
                return self._joint(key, block, layers, x)
        return self._alone(layer, block, x)

    def _begin(self, part: str) -> tuple[LoraSlots, InputRecorder | None]:
        """The factors for a part of the model, and what notes the inputs of its layers."""
        model = self._model
        recorder = model.shared.begin(part, lambda key: model.layers[key].outputs)
        sets = [unit.lora_set for unit in self._units]
        layers = [key for key in model.layers if key[0] == part]
        slots = model.slots.get(part, sets, layers, model.shared.groups(part))
        self._parts[part] = slots, recorder
        return slots, recorder

    def _check_rows(self, x: Tensor) -> None:
        if x.shape[0] % self._batch_size:
            raise Unsplittable(
                f"a layer got {x.shape[0]} rows of a batch of {self._batch_size}; "
                "they cannot be assigned to requests"
            )

    def _plain(self, layer: LoraLayer, x: Tensor) -> Tensor:
        """The layer's output without products of low rank."""
        output = layer.plain(x)
        if not self._row_changes.touch(layer.key):
            return output
        self._check_rows(x)
        output = output.contiguous()
        self._row_changes.apply(layer, x, output)
        return output

    def _alone(self, layer: LoraLayer, block: Block, x: Tensor) -> Tensor:
        output = self._plain(layer, x).contiguous()
        kind, index = block.places[layer.key]
        member = block.plan.layers.index(layer.key)
        a, b = block.a[:, :, member : member + 1], block.b[kind][index : index + 1]
        x, rows = self._by_row(x), self._by_row(output)[None]
        for run in self._runs_of(block):
            part = slice(run.first, run.end)
            self._add([rows[:, run.start : run.stop]], x, run, block, a[part], [b[:, part]])
        return output

    def _joint(self, key: LayerKey, block: Block, layers: Sequence[LoraLayer], x: Tensor) -> Tensor:
        outputs = joint_outputs(layers, x)
        for member, output in zip(layers, (o for out in outputs for o in out), strict=True):
            if self._row_changes.touch(member.key):
                self._row_changes.apply(member, x, output)
        rows = [out.view(len(out), self._batch_size, -1, out.shape[-1]) for out in outputs]
        by_row = self._by_row(x)
        for run in self._runs_of(block):
            part = slice(run.first, run.end)
            if run.stop - run.start == self._batch_size:
                outs, b = rows, block.b
            else:  # rows of one layer are adjacent, those of several are not
                outs = [one[None, run.start : run.stop] for out in rows for one in out]
                b = [one[None, part] for factors in block.b for one in factors]
            self._add(outs, by_row, run, block, block.a[part], b)
        for one, output in zip(block.plan.layers, (o for out in outputs for o in out), strict=True):
            self._ready[one] = (x, output)
        return self._ready.pop(key)[1]

    def _by_row(self, x: Tensor) -> Tensor:
        """(batch size, tokens, width) of (batch size * k, ..., width): video models fold k frames into each
        row, the frames of a row adjacent."""
        return x.reshape(self._batch_size, -1, x.shape[-1])

    def _add(
        self,
        outs: Sequence[Tensor],
        x: Tensor,
        run: SlotRun,
        block: Block,
        a: Tensor,
        b: Sequence[Tensor],
    ) -> None:
        """outs: for each class (C, rows of the run, tokens, out). x: (batch size, tokens, in)."""
        slots = run.end - run.first
        ranks = block.plan.ranks[run.first : run.end]
        products = Products(a, b, ranks, (run.stop - run.start) // slots)
        x = x[run.start : run.stop].reshape(slots, -1, x.shape[-1])
        outs = [out.view(len(out), slots, -1, out.shape[-1]) for out in outs]
        invariance = self._model.invariance
        if invariance is None or invariance.holds(x, products):
            add_linear(outs, x, products)
        else:
            add_linear_one_by_one(outs, x, products)

    def _convolution(self, layer: LoraLayer, conv: nn.Conv2d, block: Block, x: Tensor) -> Tensor:
        output = self._plain(layer, x).contiguous()
        out = output.view(self._batch_size, -1, *output.shape[1:])
        x = x.reshape(self._batch_size, -1, *x.shape[1:])
        a, b = block.a[:, :, 0], block.b[0][0]
        for run in self._runs_of(block):
            slots, rows = run.end - run.first, run.stop - run.start
            if self._model.invariance is None:
                part = slice(run.first, run.end)
                own_out, own_x = (t[run.start : run.stop].view(slots, -1, *t.shape[2:]) for t in (out, x))
                add_convolution(conv, own_out, own_x, a[part], b[part])
                continue
            for row in range(rows):  # one group and several take different ways through a convolution
                slot, at = (
                    run.first + row * slots // rows,
                    slice(run.start + row, run.start + row + 1),
                )
                own = slice(slot, slot + 1), slice(block.plan.ranks[slot])
                add_convolution(conv, out[at], x[at], a[own], b[own])
        return output

    def _runs_of(self, block: Block) -> list[SlotRun]:
        slots = block.plan.slots
        runs = self._runs.get(slots)
        if runs is None:
            runs = self._runs[slots] = runs_of([self._units[slot] for slot in slots])
        return runs


def units_of(lora_sets: Sequence[Hashable | None]) -> list[Unit]:
    """The rows with LoRAs as runs with one set.

    Runs of several lengths are cut into units of one length, for one product of all of them, where that takes
    at most twice as many slots: each has the bytes of its factors.
    """
    runs, start = [], 0
    for lora_set, run in groupby(lora_sets):
        rows = len(list(run))
        if isinstance(lora_set, LoraSet):
            runs.append(Unit(lora_set, start, rows))
        start += rows
    each = gcd(*(run.rows for run in runs))
    if sum(run.rows for run in runs) > 2 * len(runs) * each:
        return runs
    return [Unit(run.lora_set, run.start + done, each) for run in runs for done in range(0, run.rows, each)]


def runs_of(units: Sequence[Unit]) -> list[SlotRun]:
    """The units of one length whose rows are adjacent, together."""
    runs: list[SlotRun] = []
    for index, unit in enumerate(units):
        stop = unit.start + unit.rows
        if runs and runs[-1].stop == unit.start and units[index - 1].rows == unit.rows:
            runs[-1] = replace(runs[-1], end=index + 1, stop=stop)
        else:
            runs.append(SlotRun(index, index + 1, unit.start, stop))
    return runs
