"""Where each tensor of a LoRA file belongs in a model, and why those that have no place are refused.

By names and shapes alone. Loads no torch. Every tensor is in a placed change or in a problem: nothing is
dropped in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deployments.lora_format.change_shape import change_shape, rescales_inputs, text
from deployments.lora_format.header import LoraHeader, TensorEntry
from deployments.lora_format.layer_names import LayerKey, LayerNames, Target
from deployments.lora_format.tensor_groups import ModuleTensors, Problem

CURE = "use a file that was trained for this model, or save it without this layer"


@dataclass(frozen=True, slots=True)
class PlacedChange:
    """The tensors that change one layer: the rows of their product that are this layer's."""

    target: Target
    tensors: ModuleTensors


@dataclass(frozen=True, slots=True)
class PlacedTensors:
    """All tensors of a file."""

    changes: tuple[PlacedChange, ...]
    problems: tuple[Problem, ...]


def place(header: LoraHeader, names: LayerNames) -> PlacedTensors:
    """The layers of the model that the tensors change, and a problem for every tensor without a place."""
    problems = list(header.groups.problems)
    changes: list[PlacedChange] = []
    changed: dict[LayerKey, ModuleTensors] = {}
    for module in header.groups.modules:
        targets = names.find(module.module) or ()
        reason = _mismatch(module, targets, header.tensors) or _second_change(module, targets, changed)
        if reason is not None:
            nothing_if_zero = module.factors if module.magnitude is None else ()
            problems.append(Problem(module.first, reason, nothing_if_zero))
            continue
        changed |= {target.layer: module for target in targets}
        changes += [PlacedChange(target, module) for target in targets]
    return PlacedTensors(tuple(changes), tuple(problems))


def _mismatch(
    module: ModuleTensors, targets: Sequence[Target], entries: Mapping[str, TensorEntry]
) -> str | None:
    """Why the tensors cannot change these layers; None where they can."""
    if not targets:
        return f"{module.first!r} names no Linear or Conv2d layer of this model; {CURE}"
    shape = change_shape(module, entries)
    if isinstance(shape, str):
        return shape
    first = f"{module.first!r} is of shape {text(entries[module.first].shape)}"
    for target in targets:
        inputs = math.prod(target.weight[1:])  # a 1x1 convolution may be a Linear's factor
        if shape.inputs != inputs:
            needed = text(("rank", *target.weight[1:])) if module.network == "lora" else f"{inputs} inputs"
            return f"{first}, and its layer needs {needed}; {CURE}"
    rows = targets[-1].rows[1]
    if shape.outputs != rows:
        if module.network != "lora":
            return f"{first}, and its layer needs {rows} outputs; {CURE}"
        up = module.roles["up"]
        needed = text((rows, "rank"))
        return f"{up!r} is of shape {text(entries[up].shape)}, and its layer needs {needed}; {CURE}"
    if module.magnitude is not None and rescales_inputs(module, entries):
        return _columns_mismatch(module, targets, entries)
    return None


def _columns_mismatch(
    module: ModuleTensors, targets: Sequence[Target], entries: Mapping[str, TensorEntry]
) -> str | None:
    """Why the columns of these layers cannot have the lengths of a DoRA."""
    assert module.magnitude is not None, "asked of a DoRA"
    if len(targets) > 1:
        return (
            f"{module.magnitude!r} has a length for each input of several layers together; train it with a "
            "magnitude for each output (wd_on_out)"
        )
    if math.prod(entries[module.magnitude].shape) != targets[0].weight[1]:
        return (
            f"{module.magnitude!r} is of shape {text(entries[module.magnitude].shape)}, and its layer has "
            f"{targets[0].weight[1]} inputs; {CURE}"
        )
    return None


def _second_change(
    module: ModuleTensors, targets: Sequence[Target], changed: Mapping[LayerKey, ModuleTensors]
) -> str | None:
    """Why a layer cannot be changed by two modules of a file: trainers disagree on what that means."""
    for target in targets:
        if target.layer in changed:
            one = changed[target.layer].first
            return f"{one!r} and {module.first!r} change the same layer; save one of them"
    return None
