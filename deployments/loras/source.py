"""A LoRA file as low-rank factors for the layers of a loaded model, or the reason for its refusal.

Names and shapes are matched by deployments/lora_format, for every trainer alike. diffusers' own converters
are not used: they drop tensors and alphas without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from deployments.engine.out_of_memory import is_out_of_memory
from deployments.lora_format.file_info import LoraFileInfo, inspect_file
from deployments.lora_format.header import refusal
from deployments.lora_format.layer_names import PARTS, LayerKey, LayerNames, Target
from deployments.lora_format.placement import PlacedFactors, place
from deployments.lora_format.scales import LoraScales


@dataclass(frozen=True, slots=True)
class LowRankFactors:
    """What a LoRA adds to one layer: scale * b @ (a @ x).

    a: (rank, in) for a Linear, (rank, in, kh, kw) for a Conv2d. b: (out, rank), its columns one after the
    other in memory, so that factors of several ranks can be stacked. Both have the layer's dtype.
    """

    a: Tensor
    b: Tensor
    scale: float  # alpha / rank


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA converted for one model."""

    info: LoraFileInfo
    factors: Mapping[LayerKey, LowRankFactors]

    @property
    def size_bytes(self) -> int:
        """Of all factors, on the host or the device."""
        tensors = [tensor for one in self.factors.values() for tensor in (one.a, one.b)]
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
    factors = {
        placed.target.layer: _fit(placed, _layer(pipeline, placed.target), tensors, scales)
        for placed in placement.factors
        if not values.is_zero(placed.pair)
    }
    return Adapter(info, factors)


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
    placed: PlacedFactors, layer: nn.Module, tensors: Mapping[str, Tensor], scales: LoraScales
) -> LowRankFactors:
    """The factors in the layer's dtype and shapes."""
    pair, target = placed.pair, placed.target
    a = tensors[pair.down]
    rank = a.shape[0]
    b = tensors[pair.up].reshape(-1, rank)[slice(*target.rows)]
    if target.swapped:
        b = torch.cat(b.chunk(2)[::-1])
    dtype = _compute_dtype(layer)
    return LowRankFactors(
        a.reshape(rank, *target.weight[1:]).to(dtype).contiguous(),
        b.to(dtype).t().contiguous().t(),
        scales.of(*target.layer, rank, None if pair.alpha is None else float(tensors[pair.alpha])),
    )


def _compute_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype of the layer's products: layers whose weights are stored in another one name it."""
    named = vars(layer).get("compute_dtype")
    if isinstance(named, torch.dtype):
        return named
    weight = layer.weight
    assert isinstance(weight, Tensor), "a Linear or a Conv2d has one"
    plain = weight.is_floating_point() and weight.element_size() > 1
    return weight.dtype if plain else torch.bfloat16
