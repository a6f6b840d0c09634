"""Weights kept in 8 bits and cast to the dtype that they compute in, layer by layer as each one runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.hooks.hooks import HookRegistry
from diffusers.hooks.layerwise_casting import LayerwiseCastingHook
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

# layers that diffusers leaves as they are, because pictures suffer most from them
SKIPPED = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$")
STORED = torch.float8_e4m3fn


class _Casting(LayerwiseCastingHook):
    """diffusers' hook, by which its models know the dtype that they compute in, with casts that leave the
    module as it is: the original replaces the layer's weights twice in each forward, which neither offloaded
    weights nor two threads allow, and rounds them each time."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002  a hook's
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:  # noqa: ARG002  a hook's
        return output

    def new_forward(self, module: nn.Module, x: Tensor) -> Tensor:
        weight = getattr(module, "weight").to(self.compute_dtype)  # noqa: B009  typed as Tensor or Module
        bias = None if module.bias is None else getattr(module, "bias").to(self.compute_dtype)  # noqa: B009
        if isinstance(module, nn.Linear):
            return functional.linear(x, weight, bias)
        output: Tensor = getattr(module, "_conv_forward")(x, weight, bias)  # noqa: B009
        return output


def cast_layers(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep the module's Linear and convolution layers in float8_e4m3fn, without scales; they compute in
    `dtype`. Layers that diffusers' layerwise casting skips stay as they are."""
    for layer in list(castable_layers(module)):
        hook = _Casting(STORED, dtype, non_blocking=False)
        HookRegistry.check_if_exists_or_initialize(layer).register_hook(hook, "layerwise_casting")
        vars(layer)["compute_dtype"] = dtype


def castable_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers that may be kept in 8 bits."""
    patterns = list(SKIPPED)
    # T5 casts its activations to the dtype of such a layer's weight
    patterns += [rf"(^|\.){re.escape(name)}($|\.)" for name in module_names(module, "_keep_in_fp32_modules")]
    if isinstance(module, ModelMixin):
        patterns += module_names(module, "_skip_layerwise_casting_patterns")
    for name, layer in module.named_modules():
        supported = type(layer) is nn.Linear or (isinstance(layer, _ConvNd) and not layer.transposed)
        if supported and not any(re.search(pattern, name) for pattern in patterns):
            yield layer


def module_names(module: nn.Module, attribute: str) -> list[str]:
    """Names of layers that the module's class lists in this attribute; diffusers and transformers may have
    None there."""
    return list(getattr(module, attribute, None) or ())
