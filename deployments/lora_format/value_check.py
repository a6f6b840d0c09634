"""Whether the values of a LoRA file can be served: numbers of a sane size, and nothing that gets lost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from deployments.lora_format.header import LoraHeader, refusal
from deployments.lora_format.placement import check_pair
from deployments.lora_format.scales import LoraScales
from deployments.lora_format.tensor_groups import FactorPair, Problem, TensorGroups
from deployments.lora_format.values import ReadBytes, TensorValues, tensor_values

PEFT_PREFIX = "base_model.model."
MAX_VALUE = 65504.0  # of a factor: float16's largest
MAX_CHANGE = 1000.0  # root mean square of what is added to a weight; those of models are below 1
CURE = "its training has diverged or the file is damaged; use an earlier checkpoint"


@dataclass(frozen=True, slots=True)
class CheckedValues:
    """The values of an accepted file."""

    tensors: Mapping[str, TensorValues]  # by name
    notes: tuple[str, ...] = ()  # sentences: what has no effect, or is missing

    def is_zero(self, pair: FactorPair) -> bool:
        """Whether these factors change nothing: one of them is zero, or their alpha."""
        return any(self.tensors[key].is_zero for key in (pair.down, pair.up, pair.alpha) if key is not None)

    def is_harmless(self, problem: Problem) -> bool:
        """Whether nothing is lost without the tensors of this problem."""
        return any(self.tensors[key].is_zero for key in problem.unless_zero)


def check_values(header: LoraHeader, read: ReadBytes) -> CheckedValues:
    """The values of all tensors. read: bytes from and to, counted from the first tensor.

    Raises BadRequest for a value that is not finite, a change of absurd size, and a tensor that is served for
    no model, unless it is zero.
    """
    tensors = {}
    for key, entry in header.tensors.items():
        values = tensors[key] = tensor_values(entry, read)
        if not math.isfinite(values.largest):
            raise refusal(f"{key!r} holds values that are not finite (NaN or infinite); {CURE}")
    groups = header.groups
    checked = CheckedValues(tensors)
    for problem in groups.problems:
        if not checked.is_harmless(problem):
            raise refusal(problem.reason)
    largest_alpha = LoraScales(header.metadata).largest_alpha
    for pair in groups.pairs:
        reason = check_pair(pair, header.tensors) or _absurdity(pair, header, tensors, largest_alpha)
        if reason is not None and not checked.is_zero(pair):
            raise refusal(reason)
    notes = (*_notes_on_zeros(groups, checked), *_notes_on_alphas(groups, largest_alpha))
    return replace(checked, notes=notes)


def _absurdity(
    pair: FactorPair, header: LoraHeader, values: Mapping[str, TensorValues], default_alpha: float | None
) -> str | None:
    """What is absurd about the size of the change; None where nothing is."""
    for key in (pair.down, pair.up):
        if values[key].largest > MAX_VALUE:
            return f"{key!r} holds values up to {values[key].largest:.3g}; at most {MAX_VALUE:g}: {CURE}"
    rank = header.tensors[pair.down].shape[0]
    alpha = default_alpha if pair.alpha is None else values[pair.alpha].first
    scale = 1.0 if alpha is None else abs(alpha) / rank
    change = scale * math.sqrt(rank) * values[pair.down].rms * values[pair.up].rms
    if change > MAX_CHANGE:
        culprit = pair.up if pair.alpha is None or scale <= 1 else pair.alpha
        return (
            f"{culprit!r} gives a change of {change:.3g} on average, with alpha / rank {scale:.3g}; "
            f"at most {MAX_CHANGE:g}: {CURE}"
        )
    return None


def _notes_on_alphas(groups: TensorGroups, largest_alpha: float | None) -> tuple[str, ...]:
    """That the alphas of a file that peft saved are elsewhere."""
    has_alphas = largest_alpha is not None or any(pair.alpha is not None for pair in groups.pairs)
    if has_alphas or not all(pair.module.startswith(PEFT_PREFIX) for pair in groups.pairs):
        return ()
    return (
        "It holds no alphas, so alpha / rank counts as 1; peft keeps them in adapter_config.json beside the "
        "file: set the weight to lora_alpha / r where they differ.",
    )


def _notes_on_zeros(groups: TensorGroups, values: CheckedValues) -> tuple[str, ...]:
    """What the file holds without effect."""
    idle = [pair.down for pair in groups.pairs if values.is_zero(pair)]
    idle += [problem.key for problem in groups.problems]
    if not idle:
        return ()
    if len(idle) == len(groups.pairs) + len(groups.problems):
        return ("All layers are zero: it changes nothing.",)
    return (f"{len(idle)} of its layers are zero and change nothing; the first is {idle[0]!r}.",)
