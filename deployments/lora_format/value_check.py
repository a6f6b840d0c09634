"""Whether the values of a LoRA file can be served: numbers of a sane size, and nothing that gets lost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from deployments.lora_format.change_shape import ChangeShape, change_shape
from deployments.lora_format.header import LoraHeader, refusal
from deployments.lora_format.scales import LoraScales
from deployments.lora_format.tensor_groups import ModuleTensors, Problem, TensorGroups
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

    def is_zero(self, module: ModuleTensors) -> bool:
        """Whether these tensors change nothing: a factor is zero, or alpha, and no row is rescaled."""
        keys = (*module.factors, module.alpha)
        return module.magnitude is None and any(self.tensors[key].is_zero for key in keys if key is not None)

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
    scales = LoraScales(header.metadata)
    for module in groups.modules:
        shape = change_shape(module, header.tensors)
        reason = shape if isinstance(shape, str) else _absurdity(module, shape, tensors, scales.largest_alpha)
        if reason is not None and not checked.is_zero(module):
            raise refusal(reason)
    if scales.rescaled is not None and not any(module.magnitude for module in groups.modules):
        raise refusal(
            f"its metadata says that it is a DoRA ({scales.rescaled!r}), and it has no magnitudes "
            "(lora_magnitude_vector); save it with them, or correct the metadata"
        )
    notes = (*_notes_on_zeros(groups, checked), *_notes_on_alphas(groups, scales.largest_alpha))
    return replace(checked, notes=notes)


def _absurdity(
    module: ModuleTensors,
    shape: ChangeShape,
    values: Mapping[str, TensorValues],
    default_alpha: float | None,
) -> str | None:
    """What is absurd about the size of the change; None where nothing is."""
    for key in module.factors:
        if values[key].largest > MAX_VALUE:
            return f"{key!r} holds values up to {values[key].largest:.3g}; at most {MAX_VALUE:g}: {CURE}"
    alpha = default_alpha if module.alpha is None else values[module.alpha].first
    scale = 1.0 if alpha is None or shape.alpha_rank is None else abs(alpha) / shape.alpha_rank
    change = scale * math.sqrt(shape.sum_rank) * math.prod(values[key].rms for key in module.factors)
    if change > MAX_CHANGE:
        culprit = module.factors[-1] if module.alpha is None or scale <= 1 else module.alpha
        return (
            f"{culprit!r} gives a change of {change:.3g} on average, with alpha / rank {scale:.3g}; "
            f"at most {MAX_CHANGE:g}: {CURE}"
        )
    return None


def _notes_on_alphas(groups: TensorGroups, largest_alpha: float | None) -> tuple[str, ...]:
    """That the alphas of a file that peft saved are elsewhere."""
    has_alphas = largest_alpha is not None or any(module.alpha is not None for module in groups.modules)
    if has_alphas or not all(module.module.startswith(PEFT_PREFIX) for module in groups.modules):
        return ()
    return (
        "It holds no alphas, so alpha / rank counts as 1; peft keeps them in adapter_config.json beside the "
        "file: set the weight to lora_alpha / r where they differ.",
    )


def _notes_on_zeros(groups: TensorGroups, values: CheckedValues) -> tuple[str, ...]:
    """What the file holds without effect."""
    idle = [module.first for module in groups.modules if values.is_zero(module)]
    idle += [problem.key for problem in groups.problems]
    if not idle:
        return ()
    if len(idle) == len(groups.modules) + len(groups.problems):
        return ("All layers are zero: it changes nothing.",)
    return (f"{len(idle)} of its layers are zero and change nothing; the first is {idle[0]!r}.",)
