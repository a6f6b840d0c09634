"""A LoRA file converted to low-rank factors for the layers of a loaded model, or the reason for its
refusal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from deployments.engine.out_of_memory import is_out_of_memory
from deployments.lora_format.file_info import MAX_RANK, LoraFileInfo, lora_info
from deployments.lora_format.header import read_header, refusal
from deployments.lora_format.shape_check import PARTS
from deployments.loras.key_names import for_converter, in_peft_names
from deployments.loras.scales import LoraScales, peft_settings
from deployments.protocol.errors import BadRequest

CONVERTER_ERRORS = (ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, RuntimeError,
                    NotImplementedError)  # fmt: skip

LayerKey = tuple[str, str]  # part of the pipeline ("transformer"), path of the layer in it


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


def read_lora(file: bytes, pipeline: Any) -> Adapter:
    """The LoRA of a safetensors file, fitted to the modules of a diffusers pipeline.

    Runs no code of the file and opens no path. Raises BadRequest with the reason: all that inspect_lora
    finds, values that are not finite, layers of another family, shapes that do not fit, or anything that
    cannot be expressed as low-rank factors.
    """
    header = read_header(file)
    info = lora_info(header, len(file))
    try:
        tensors = load_tensors(file)
    except (SafetensorError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):  # of the host; nothing is wrong with the file
            raise
        raise refusal(f"it is not readable ({error})") from None
    for key, tensor in tensors.items():
        if not _is_finite(tensor):
            raise refusal(f"{key!r} holds values that are not finite")
    converted, alphas = _converted(tensors, pipeline, info)
    factors: dict[LayerKey, LowRankFactors] = {}
    scales = LoraScales(alphas, peft_settings(header.metadata))
    for part in PARTS:
        prefix = f"{part}."
        own = {
            key.removeprefix(prefix): converted.pop(key) for key in list(converted) if key.startswith(prefix)
        }
        if own:
            factors |= _factors_of_part(part, getattr(pipeline, part, None), own, scales, info)
    if converted:
        raise _unknown_layer(next(iter(converted)), pipeline, info)
    if not factors:
        raise refusal("it has no layer of this model")
    return Adapter(info, factors)


def layer_shapes(pipeline: Any) -> dict[str, tuple[int, ...]]:
    """Weight shapes of all layers that a LoRA may change, by part and path, for shape_check.find_mismatch.

    (out, in) for a Linear, (out, in, kh, kw) for a Conv2d.
    """
    found: dict[str, tuple[int, ...]] = {}
    for part in PARTS:
        module = getattr(pipeline, part, None)
        for path, layer in module.named_modules() if isinstance(module, nn.Module) else ():
            if isinstance(layer, nn.Linear):
                found[f"{part}.{path}"] = (layer.out_features, layer.in_features)
            elif isinstance(layer, nn.Conv2d):
                found[f"{part}.{path}"] = (layer.out_channels, layer.in_channels, *layer.kernel_size)
    return found


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. A finite sum proves it at a tenth of the cost; a sum may also
    overflow."""
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())


def _unknown_layer(key: str, pipeline: Any, info: LoraFileInfo) -> BadRequest:
    return refusal(f"{key!r} names no layer of {type(pipeline).__name__}{_family_hint(info)}")


def _family_hint(info: LoraFileInfo) -> str:
    return "" if info.family == "unknown" else f"; it looks like a LoRA for {info.family}"


def _converted(
    tensors: Mapping[str, Tensor], pipeline: Any, info: LoraFileInfo
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors under diffusers' names with the part in front, and alphas by the same names.

    Every key style is converted by diffusers itself, given tensors and never a path.
    """
    convert = getattr(type(pipeline), "lora_state_dict", None)
    if convert is None:
        raise refusal(f"{type(pipeline).__name__} has no LoRA support in diffusers")
    unet = getattr(pipeline, "unet", None)
    options = {} if unet is None else {"unet_config": unet.config}
    prepared = for_converter(tensors, pipeline)
    first = next(iter(prepared))
    try:
        answer = convert(dict(prepared), return_alphas=True, **options)
    except CONVERTER_ERRORS as error:
        raise refusal(
            f"its keys are not those of a LoRA for {type(pipeline).__name__} "
            f"(the first is {first!r}: {type(error).__name__} {str(error)[:200]})"
        ) from None
    converted, alphas = (answer[0], answer[1]) if isinstance(answer, tuple) else (answer, None)
    if not converted or not all(isinstance(value, Tensor) for value in converted.values()):
        raise _unknown_layer(first, pipeline, info)
    return dict(converted), {key: float(value) for key, value in (alphas or {}).items()}


def _factors_of_part(
    part: str, module: Any, tensors: dict[str, Tensor], scales: LoraScales, info: LoraFileInfo
) -> dict[LayerKey, LowRankFactors]:
    """Factors for the layers of one part of the pipeline."""
    if not isinstance(module, nn.Module):
        raise refusal(f"it changes {part}, which this model does not have")
    tensors = in_peft_names(part, module, tensors)
    layers = dict(module.named_modules())
    found: dict[LayerKey, LowRankFactors] = {}
    for key in tensors:
        path, side, rest = key.rpartition(".lora_A.")
        if not side:
            path, side, rest = key.rpartition(".lora_B.")
        if not side or rest != "weight":
            raise refusal(f"'{part}.{key}' is more than a low-rank factor (a bias, a norm or a whole layer)")
        if path not in layers:
            raise refusal(f"'{part}.{key}' names no layer of this model{_family_hint(info)}")
        if (part, path) in found:
            continue
        a, b = tensors.get(f"{path}.lora_A.weight"), tensors.get(f"{path}.lora_B.weight")
        if a is None or b is None:
            raise refusal(f"'{part}.{key}' has no counterpart; both lora_A and lora_B are needed")
        scale = scales.of(part, path, a.shape[0] if a.ndim else 0)
        found[part, path] = _fit(f"{part}.{path}", layers[path], a, b, scale)
    return found


def _fit(name: str, layer: nn.Module, a: Tensor, b: Tensor, scale: float) -> LowRankFactors:
    """The factors in the layer's dtype and shapes. Raises BadRequest where a shape or the scale does not
    fit."""
    a_shape, b_shape = _factor_shapes(name, layer, a.shape[0] if a.ndim else 0)
    if a.shape != a_shape and a.numel() == math.prod(a_shape) and a.flatten(1).shape[1] == a_shape[1]:
        a = a.reshape(a_shape)  # a 1x1 convolution trained as a Linear, or the other way round
    if a.shape != a_shape or b.shape[:2] != b_shape or b.numel() != math.prod(b_shape):
        raise refusal(
            f"{name} has factors of shape {tuple(a.shape)} and {tuple(b.shape)}; "
            f"this model's layer needs {a_shape} and {b_shape}"
        )
    if not math.isfinite(scale):
        raise refusal(f"{name} has an alpha that is not finite")
    weight = layer.weight
    assert isinstance(weight, Tensor), "a Linear or a Conv2d has one"
    plain = weight.is_floating_point() and weight.element_size() > 1
    dtype = weight.dtype if plain else torch.bfloat16  # quantised weights compute in it
    return LowRankFactors(a.to(dtype).contiguous(), b.reshape(b_shape).to(dtype).t().contiguous().t(), scale)


def _factor_shapes(name: str, layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The shapes of a and b that the layer needs. Raises BadRequest for a rank or a layer that is not
    served."""
    if not 0 < rank <= MAX_RANK:
        raise refusal(f"{name} has rank {rank}; 1-{MAX_RANK} are possible")
    if isinstance(layer, nn.Linear):
        return (rank, layer.in_features), (layer.out_features, rank)
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
        return (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank)
    raise refusal(f"{name} is a {type(layer).__name__}; LoRAs act on Linear and Conv2d layers")
