"""Where each tensor of a LoRA file belongs in a model, and why those that have no place are refused.

By names and shapes alone. Loads no torch. Every tensor is in a placed factor or in a problem: nothing is
dropped in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deployments.lora_format.header import FACTOR_DTYPES, LoraHeader, TensorEntry
from deployments.lora_format.layer_names import LayerKey, LayerNames, Target
from deployments.lora_format.tensor_groups import FactorPair, Problem

CURE = "use a file that was trained for this model, or save it without this layer"


@dataclass(frozen=True, slots=True)
class PlacedFactors:
    """The factors of one layer: rows of `up` times `down`, times alpha / rank."""

    target: Target
    pair: FactorPair


@dataclass(frozen=True, slots=True)
class PlacedTensors:
    """All tensors of a file."""

    factors: tuple[PlacedFactors, ...]
    problems: tuple[Problem, ...]


def place(header: LoraHeader, names: LayerNames) -> PlacedTensors:
    """The layers of the model that the factors change, and a problem for every tensor without a place."""
    problems = list(header.groups.problems)
    factors: list[PlacedFactors] = []
    changed: dict[LayerKey, FactorPair] = {}
    for pair in header.groups.pairs:
        targets = names.find(pair.module) or ()
        reason = _mismatch(pair, targets, header.tensors) or _second_change(pair, targets, changed)
        if reason is not None:
            problems.append(Problem(pair.down, reason, (pair.up, pair.down)))
            continue
        changed |= {target.layer: pair for target in targets}
        factors += [PlacedFactors(target, pair) for target in targets]
    return PlacedTensors(tuple(factors), tuple(problems))


def check_pair(pair: FactorPair, tensors: Mapping[str, TensorEntry]) -> str | None:
    """What is wrong with these tensors whatever the model is, as a clause; None where nothing is."""
    down, up = tensors[pair.down], tensors[pair.up]
    for key, entry in ((pair.down, down), (pair.up, up)):
        if entry.dtype not in FACTOR_DTYPES:
            return f"{key!r} is of type {entry.dtype}; save it as one of {', '.join(FACTOR_DTYPES)}"
        if len(entry.shape) < 2:
            return f"{key!r} is of shape {_text(entry.shape)}, which is no factor's; save the file again"
    rank = down.shape[0]
    if not rank or math.prod(up.shape[1:]) != rank:
        return (
            f"{pair.up!r} is of shape {_text(up.shape)}, and its counterpart {_text(down.shape)} needs "
            f"{_text((up.shape[0], rank))}; save the file again"
        )
    if pair.alpha is not None and math.prod(tensors[pair.alpha].shape) != 1:
        return f"{pair.alpha!r} is of shape {_text(tensors[pair.alpha].shape)}; an alpha is one number"
    return None


def _mismatch(pair: FactorPair, targets: Sequence[Target], tensors: Mapping[str, TensorEntry]) -> str | None:
    """Why the factors cannot change these layers; None where they can."""
    if not targets:
        return f"{pair.down!r} names no Linear or Conv2d layer of this model; {CURE}"
    reason = check_pair(pair, tensors)
    if reason is not None:
        return reason
    down, up = tensors[pair.down].shape, tensors[pair.up].shape
    for target in targets:
        if math.prod(down[1:]) != math.prod(target.weight[1:]):  # a 1x1 convolution may be a Linear's factor
            needed = _text(("rank", *target.weight[1:]))
            return f"{pair.down!r} is of shape {_text(down)}, and its layer needs {needed}; {CURE}"
    rows = targets[-1].rows[1]
    if up[0] != rows:
        return f"{pair.up!r} is of shape {_text(up)}, and its layer needs {_text((rows, 'rank'))}; {CURE}"
    return None


def _second_change(
    pair: FactorPair, targets: Sequence[Target], changed: Mapping[LayerKey, FactorPair]
) -> str | None:
    """Why a layer cannot be changed by two modules of a file: trainers disagree on what that means."""
    for target in targets:
        if target.layer in changed:
            return f"{changed[target.layer].down!r} and {pair.down!r} change the same layer; save one of them"
    return None


def _text(shape: tuple[object, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
