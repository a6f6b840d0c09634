"""A LoRA file as factors for the layers of a loaded model, or the reason for its refusal.

Names and shapes are matched by deployments/lora_format, for every trainer alike. diffusers' own converters
are not used: they drop tensors and alphas without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from deployments.engine.out_of_memory import is_out_of_memory
from deployments.lora_format.change_shape import ChangeShape, change_shape, rescales_inputs
from deployments.lora_format.file_info import LoraFileInfo, inspect_file
from deployments.lora_format.header import LoraHeader, refusal
from deployments.lora_format.layer_names import PARTS, LayerKey, LayerNames, Target
from deployments.lora_format.placement import PlacedChange, place
from deployments.lora_format.scales import LoraScales
from deployments.loras.layer_change import LayerFactors, kronecker, low_rank
from deployments.loras.rescale import Magnitude, Rescale


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA, LoHa, LoKr or DoRA converted for one model."""

    info: LoraFileInfo
    factors: Mapping[LayerKey, LayerFactors]
    magnitudes: Mapping[LayerKey, Magnitude] = field(default_factory=dict)  # of a DoRA
    rescales: Mapping[LayerKey, Rescale] = field(default_factory=dict)  # of the magnitudes, on the device

    @property
    def size_bytes(self) -> int:
        """Of all factors, on the host or the device."""
        tensors = [tensor for one in self.factors.values() for tensor in one.tensors]
        tensors += [one.lengths for one in self.magnitudes.values() for _ in range(4)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def read_lora(file: bytes, pipeline: Any, names: LayerNames | None = None) -> Adapter:
    """The LoRA of a safetensors file, fitted to the modules of a diffusers pipeline. names: of its layers,
    where they are known.

    Every tensor is used as it is, or is zero and changes nothing. Runs no code of the file and opens no path.
    Raises BadRequest with the reason and the key: all that inspect_lora finds, layers of another model, and
    shapes that do not fit.
    """
    header, info, values = inspect_file(file)
    placement = place(header, LayerNames(layer_shapes(pipeline)) if names is None else names)
    for problem in placement.problems:
        if not values.is_harmless(problem):
            raise refusal(f"{problem.reason}{_family_hint(info)}")
    try:
        tensors = load_tensors(file)
    except (SafetensorError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):  # of the host; nothing is wrong with the file
            raise
        raise refusal(f"it is not readable ({error})") from None
    scales = LoraScales(header.metadata)
    changes = [placed for placed in placement.changes if not values.is_zero(placed.tensors)]
    factors = {
        placed.target.layer: _fit(placed, _layer(pipeline, placed.target), header, tensors, scales)
        for placed in changes
    }
    magnitudes = {
        placed.target.layer: _magnitude(placed, header, tensors)
        for placed in changes
        if placed.tensors.magnitude is not None
    }
    return Adapter(info, factors, magnitudes)


def layer_shapes(pipeline: Any) -> dict[str, tuple[int, ...]]:
    """Weight shapes of all layers that a LoRA may change, by part and path, for LayerNames.

    (out, in) for a Linear, (out, in, kh, kw) for a Conv2d.
    """
    found: dict[str, tuple[int, ...]] = {}
    for part in PARTS:
        module = getattr(pipeline, part, None)
        for path, layer in module.named_modules() if isinstance(module, nn.Module) else ():
            if isinstance(layer, nn.Linear):
                found[f"{part}.{path}"] = (layer.out_features, layer.in_features)
            elif isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
                found[f"{part}.{path}"] = (layer.out_channels, layer.in_channels, *layer.kernel_size)
    return found


def _family_hint(info: LoraFileInfo) -> str:
    return "" if info.family == "unknown" else f" (it looks like a LoRA for {info.family})"


def _layer(pipeline: Any, target: Target) -> nn.Module:
    part, path = target.layer
    module = getattr(pipeline, part)
    assert isinstance(module, nn.Module), "layer_shapes lists layers of modules"
    return module.get_submodule(path)


def _fit(
    placed: PlacedChange,
    layer: nn.Module,
    header: LoraHeader,
    tensors: Mapping[str, Tensor],
    scales: LoraScales,
) -> LayerFactors:
    """The factors in the layer's dtype and shapes."""
    module, target = placed.tensors, placed.target
    shape = change_shape(module, header.tensors)
    assert isinstance(shape, ChangeShape), "placed tensors fit each other"
    make = kronecker if module.network == "lokr" else low_rank
    own = {role: tensors[key] for role, key in module.roles.items()}
    factors = make(own, target.weight, target.rows, swapped=target.swapped, dtype=_compute_dtype(layer))
    if shape.alpha_rank is None:
        return factors
    alpha = None if module.alpha is None else float(tensors[module.alpha])
    return replace(factors, scale=scales.of(*target.layer, shape.alpha_rank, alpha))


def _magnitude(placed: PlacedChange, header: LoraHeader, tensors: Mapping[str, Tensor]) -> Magnitude:
    """The lengths of the rows or columns that are this layer's."""
    module, target = placed.tensors, placed.target
    assert module.magnitude is not None, "of a DoRA"
    assert module.rescaling is not None, "of a DoRA"
    lengths = tensors[module.magnitude].float().flatten()
    of_inputs = rescales_inputs(module, header.tensors)
    if not of_inputs:
        lengths = lengths[slice(*target.rows)]
        if target.swapped:
            lengths = torch.cat(lengths.chunk(2)[::-1])
    return Magnitude(lengths.contiguous(), of_inputs, module.rescaling)


def _compute_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype of the layer's products: layers whose weights are stored in another one name it."""
    named = vars(layer).get("compute_dtype")
    if isinstance(named, torch.dtype):
        return named
    weight = layer.weight
    assert isinstance(weight, Tensor), "a Linear or a Conv2d has one"
    plain = weight.is_floating_point() and weight.element_size() > 1
    return weight.dtype if plain else torch.bfloat16
