"""From a LoRA's file to low-rank factors for the very layers of a loaded model, or the reason why not."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from torch import Tensor, nn

from deployments.lora_format.header import MAX_RANK, LoraFileInfo, inspect, raw_metadata
from deployments.protocol.errors import BadRequest

PARTS = ("transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3")  # of a pipeline
METADATA_KEY = "lora_adapter_metadata"  # where diffusers writes rank and alpha of what it saves
CONVERTER_ERRORS = (ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, RuntimeError,
                    NotImplementedError)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LowRankFactors:
    """What a LoRA adds to one layer: scale * (B A) x.

    a: (rank, in) for a Linear, (rank, in, kh, kw) for a Conv2d; b: (out, rank). Of the layer's dtype.
    """

    a: Tensor
    b: Tensor
    scale: float  # alpha / rank


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA that fits a model: factors by part of the pipeline and path of the layer in it."""

    facts: LoraFileInfo
    factors: Mapping[tuple[str, str], LowRankFactors]

    @property
    def size_bytes(self) -> int:
        tensors = [tensor for one in self.factors.values() for tensor in (one.a, one.b)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def read(file: bytes, pipeline: Any) -> Adapter:
    """The LoRA in `file`, fitted to the modules of `pipeline`. Runs no code of the file; opens no path.

    Raises BadRequest with the reason: all that `inspect` finds, values that are not finite, another family's
    layers, shapes that do not fit, or anything that cannot be expressed as low-rank factors.
    """
    facts = inspect(file)
    try:
        tensors = tensors_of(file)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise _refused(f"it is not readable ({error})") from None
    for key, tensor in tensors.items():
        if not _is_finite(tensor):
            raise _refused(f"{key!r} holds values that are not finite")
    named = _named(tensors, pipeline, facts)
    factors: dict[tuple[str, str], LowRankFactors] = {}
    scales = _Scales(named.alphas, _told_scales(raw_metadata(file)))
    for part in PARTS:
        own = {key.removeprefix(f"{part}."): named.tensors.pop(key) for key in list(named.tensors)
               if key.startswith(f"{part}.")}  # fmt: skip
        if own:
            factors |= _of_part(part, getattr(pipeline, part, None), own, scales, facts)
    if named.tensors:
        raise _foreign(next(iter(named.tensors)), pipeline, facts)
    if not factors:
        raise _refused("it has no layer of this model")
    return Adapter(facts, factors)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are. A finite sum, a tenth of the work, says so; another may only have run over."""
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())


def layer_shapes(pipeline: Any) -> dict[str, tuple[int, ...]]:
    """Of the weights of all layers that a LoRA may change, by part and path: what adapter_shapes compares."""
    found: dict[str, tuple[int, ...]] = {}
    for part in PARTS:
        module = getattr(pipeline, part, None)
        for path, layer in module.named_modules() if isinstance(module, nn.Module) else ():
            if isinstance(layer, nn.Linear):
                found[f"{part}.{path}"] = (layer.out_features, layer.in_features)
            elif isinstance(layer, nn.Conv2d):
                found[f"{part}.{path}"] = (layer.out_channels, layer.in_channels, *layer.kernel_size)
    return found


@dataclass(frozen=True, slots=True)
class _Named:
    """Tensors by diffusers' names with the part in front, and alphas by the same names."""

    tensors: dict[str, Tensor]
    alphas: dict[str, float]


def _refused(reason: str) -> BadRequest:
    return BadRequest(f"the LoRA is refused: {reason}", param="loras")


def _foreign(key: str, pipeline: Any, facts: LoraFileInfo) -> BadRequest:
    guess = "" if facts.family == "unknown" else f"; it looks like a LoRA for {facts.family}"
    return _refused(f"{key!r} names no layer of {type(pipeline).__name__}{guess}")


def _named(tensors: dict[str, Tensor], pipeline: Any, facts: LoraFileInfo) -> _Named:
    """All key styles become diffusers' through its own converters, given tensors and never a path."""
    convert = getattr(type(pipeline), "lora_state_dict", None)
    if convert is None:
        raise _refused(f"{type(pipeline).__name__} has no LoRA support in diffusers")
    unet = getattr(pipeline, "unet", None)
    options = {} if unet is None else {"unet_config": unet.config}
    prepared = _without_wrapping(tensors, pipeline)
    first = next(iter(prepared))
    try:
        answer = convert(dict(prepared), return_alphas=True, **options)
    except CONVERTER_ERRORS as error:
        raise _refused(
            f"its keys are not those of a LoRA for {type(pipeline).__name__} "
            f"(the first is {first!r}: {type(error).__name__} {str(error)[:200]})"
        ) from None
    converted, alphas = (answer[0], answer[1]) if isinstance(answer, tuple) else (answer, None)
    if not converted or not all(isinstance(value, Tensor) for value in converted.values()):
        raise _foreign(first, pipeline, facts)
    return _Named(dict(converted), {key: float(value) for key, value in (alphas or {}).items()})


def _without_wrapping(tensors: dict[str, Tensor], pipeline: Any) -> dict[str, Tensor]:
    """Keys as the converters know them.

    peft wraps a model's names in base_model.model and leaves the part out; ComfyUI and BFL keep FLUX's first
    names (double_blocks) in peft's form, which the converters know in kohya's.
    """
    plain = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    if len(plain) < len(tensors):
        return tensors
    part = "unet" if getattr(pipeline, "unet", None) is not None else "transformer"
    layers = {name for name, _ in getattr(pipeline, part).named_modules()}
    if all(_layer_of(key) in layers for key in plain):
        return {f"{part}.{key}": tensor for key, tensor in plain.items()}
    bare = {key.removeprefix("diffusion_model."): tensor for key, tensor in plain.items()}
    form = re.compile(r"((?:double|single)_blocks\..+)\.lora_([AB])\.weight")
    if type(pipeline).__name__.startswith("Flux") and all(map(form.fullmatch, bare)):
        return {_as_kohya(key, form): tensor for key, tensor in bare.items()}
    return tensors


def _as_kohya(key: str, form: re.Pattern[str]) -> str:
    match = form.fullmatch(key)
    assert match is not None, "checked by the caller"
    return f"lora_unet_{match[1].replace('.', '_')}.lora_{'down' if match[2] == 'A' else 'up'}.weight"


def _layer_of(key: str) -> str:
    """The layer's path in a key of diffusers or peft."""
    return re.split(r"\.lora_[AB]\b", _renamed(convert_unet_state_dict_to_peft, key))[0]


def _renamed(convert: Callable[[dict[str, None]], dict[str, None]], key: str) -> str:
    """What one of diffusers' converters makes of a key."""
    return next(iter(convert({key: None})))


def _of_part(
    part: str, module: Any, tensors: dict[str, Tensor], scales: _Scales, facts: LoraFileInfo
) -> dict[tuple[str, str], LowRankFactors]:
    """Factors for the layers of one part."""
    if not isinstance(module, nn.Module):
        raise _refused(f"it changes {part}, which this model does not have")
    tensors = _in_peft_names(part, module, tensors)
    layers = dict(module.named_modules())
    found: dict[tuple[str, str], LowRankFactors] = {}
    for key in tensors:
        path, kind, rest = key.rpartition(".lora_A.")
        if not kind:
            path, kind, rest = key.rpartition(".lora_B.")
        if not kind or rest != "weight":
            raise _refused(f"'{part}.{key}' is more than a low-rank factor (a bias, a norm or a whole layer)")
        if path not in layers:
            guess = "" if facts.family == "unknown" else f"; it looks like a LoRA for {facts.family}"
            raise _refused(f"'{part}.{key}' names no layer of this model{guess}")
        if (part, path) in found:
            continue
        a, b = tensors.get(f"{path}.lora_A.weight"), tensors.get(f"{path}.lora_B.weight")
        if a is None or b is None:
            raise _refused(f"'{part}.{key}' has no counterpart; both lora_A and lora_B are needed")
        scale = scales.of(part, path, a.shape[0] if a.ndim else 0)
        found[part, path] = _fitted(f"{part}.{path}", layers[path], a, b, scale)
    return found


def _in_peft_names(part: str, module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not part.startswith("text_encoder"):
        return dict(convert_unet_state_dict_to_peft(tensors))
    tensors = dict(_encoder_names(tensors))
    if not hasattr(module, "text_model"):  # transformers 5 has flattened CLIP
        tensors = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
    return tensors


def _encoder_names(tensors: dict[str, Any]) -> dict[str, Any]:
    """A text encoder's keys in peft's form, from those of either age of diffusers."""
    if any("_lora." in key for key in tensors):
        return dict(convert_state_dict_to_peft(tensors, StateDictType.DIFFUSERS_OLD))
    if any("lora_linear_layer" in key for key in tensors):
        return dict(convert_state_dict_to_peft(tensors, StateDictType.DIFFUSERS))
    return tensors


def _fitted(name: str, layer: nn.Module, a: Tensor, b: Tensor, scale: float) -> LowRankFactors:
    """The factors in the layer's dtype, after every shape has been compared."""
    rank = a.shape[0] if a.ndim else 0
    if not 0 < rank <= MAX_RANK:
        raise _refused(f"{name} has rank {rank}; 1-{MAX_RANK} are possible")
    if isinstance(layer, nn.Linear):
        inside: tuple[int, ...] = (rank, layer.in_features)
        outside = (layer.out_features, rank)
    elif isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
        inside = (rank, layer.in_channels, *layer.kernel_size)
        outside = (layer.out_channels, rank)
    else:
        raise _refused(f"{name} is a {type(layer).__name__}; LoRAs act on Linear and Conv2d layers")
    if a.shape != inside and a.numel() == math.prod(inside) and a.flatten(1).shape[1] == inside[1]:
        a = a.reshape(inside)  # a 1x1 convolution trained as a Linear, or the other way round
    if a.shape != inside or b.shape[:2] != outside or b.numel() != math.prod(outside):
        raise _refused(
            f"{name} has factors of shape {tuple(a.shape)} and {tuple(b.shape)}; "
            f"this model's layer needs {inside} and {outside}"
        )
    if not math.isfinite(scale):
        raise _refused(f"{name} has an alpha that is not finite")
    weight = layer.weight
    plain = weight.is_floating_point() and weight.element_size() > 1
    dtype = weight.dtype if plain else torch.bfloat16  # quantised weights compute in it
    return LowRankFactors(a.to(dtype).contiguous(), b.reshape(outside).to(dtype).contiguous(), scale)


class _Scales:
    """alpha / rank of each layer, from wherever the file says it."""

    def __init__(self, alphas: Mapping[str, float], told: Mapping[str, Any]) -> None:
        """alphas: by key of the converters; told: what diffusers wrote into the metadata."""
        self._told = told
        self._alphas: dict[tuple[str, str], float] = {}
        for key, alpha in alphas.items():
            part, _, rest = key.removesuffix(".alpha").partition(".")
            if part.startswith("text_encoder"):
                path = _renamed(_encoder_names, rest.removeprefix("text_model."))
            else:
                path = _renamed(convert_unet_state_dict_to_peft, rest)
            self._alphas[part, re.split(r"\.lora_[AB]\b", path)[0]] = alpha

    def of(self, part: str, path: str, rank: int) -> float:
        if rank == 0:
            return 1.0
        alpha = self._alphas.get((part, path.removeprefix("text_model.")))
        if alpha is not None:
            return alpha / rank
        told = self._told.get(f"{part}.lora_alpha")
        if self._alphas or told is None:
            return 1.0
        pattern = self._told.get(f"{part}.alpha_pattern")
        if isinstance(pattern, dict) and pattern:
            ends = (key for key in pattern if f".{path}".endswith("." + key.removeprefix("^")))
            told = pattern.get(next(ends, ""), told)
        if not isinstance(told, int | float):
            raise _refused("its metadata has an alpha that is no number")
        return told / (math.sqrt(rank) if self._told.get(f"{part}.use_rslora") else rank)


def _told_scales(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """What diffusers' save_lora_weights wrote down; nothing if the file has no such note."""
    try:
        told = json.loads(metadata.get(METADATA_KEY) or "{}")
    except (ValueError, RecursionError):
        raise _refused(f"its metadata entry {METADATA_KEY} is not JSON") from None
    if not isinstance(told, dict):
        raise _refused(f"its metadata entry {METADATA_KEY} is no table")
    for key, value in told.items():
        if key.endswith(".use_dora") and value:
            raise _refused("it is a DoRA, which rescales whole layers; train or extract it as a plain LoRA")
        if key.endswith(".lora_bias") and value:
            raise _refused("it changes biases too; train it without lora_bias")
    return told
