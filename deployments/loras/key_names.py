"""Tensor names of LoRA files, of every trainer and age, as diffusers' converters and peft write them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from torch import Tensor, nn

_SIDE = re.compile(r"\.lora_[AB]\b")
_BFL_KEY = re.compile(r"((?:double|single)_blocks\..+)\.lora_([AB])\.weight")


def for_converter(tensors: Mapping[str, Tensor], pipeline: Any) -> Mapping[str, Tensor]:
    """The tensors under names that the pipeline's `lora_state_dict` knows.

    peft wraps a model's names in base_model.model and omits the part of the pipeline; ComfyUI and BFL keep
    FLUX's first names (double_blocks) in peft's form, which the converter knows in kohya's form only.
    """
    unwrapped = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    if len(unwrapped) < len(tensors):
        return tensors
    part = "unet" if getattr(pipeline, "unet", None) is not None else "transformer"
    layers = {name for name, _ in getattr(pipeline, part).named_modules()}
    if all(layer_path(renamed(convert_unet_state_dict_to_peft, key)) in layers for key in unwrapped):
        return {f"{part}.{key}": tensor for key, tensor in unwrapped.items()}
    bare = {key.removeprefix("diffusion_model."): tensor for key, tensor in unwrapped.items()}
    if type(pipeline).__name__.startswith("Flux") and all(map(_BFL_KEY.fullmatch, bare)):
        return {_BFL_KEY.sub(_as_kohya, key): tensor for key, tensor in bare.items()}
    return tensors


def in_peft_names(part: str, module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one part of a pipeline under peft's names, "path.lora_A.weight" and
    "path.lora_B.weight"."""
    if not part.startswith("text_encoder"):
        return dict(convert_unet_state_dict_to_peft(tensors))
    tensors = dict(text_encoder_names(tensors))
    if not hasattr(module, "text_model"):  # transformers 5 has flattened CLIP
        tensors = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
    return tensors


def text_encoder_names(tensors: dict[str, Any]) -> dict[str, Any]:
    """A text encoder's tensors under peft's names, from those of any version of diffusers."""
    if any("_lora." in key for key in tensors):
        return dict(convert_state_dict_to_peft(tensors, StateDictType.DIFFUSERS_OLD))
    if any("lora_linear_layer" in key for key in tensors):
        return dict(convert_state_dict_to_peft(tensors, StateDictType.DIFFUSERS))
    return tensors


def layer_path_of_alpha(key: str) -> tuple[str, str]:
    """Part of the pipeline and path of the layer that a converter's alpha belongs to."""
    part, _, rest = key.removesuffix(".alpha").partition(".")
    if part.startswith("text_encoder"):
        name = renamed(text_encoder_names, rest.removeprefix("text_model."))
    else:
        name = renamed(convert_unet_state_dict_to_peft, rest)
    return part, layer_path(name)


def layer_path(name: str) -> str:
    """The path of the layer in one of peft's names."""
    return _SIDE.split(name)[0]


def renamed(convert: Callable[[dict[str, None]], dict[str, None]], key: str) -> str:
    """The name that one of diffusers' converters gives to a single key."""
    return next(iter(convert({key: None})))


def _as_kohya(match: re.Match[str]) -> str:
    return f"lora_unet_{match[1].replace('.', '_')}.lora_{'down' if match[2] == 'A' else 'up'}.weight"
