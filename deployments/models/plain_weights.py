"""The weights of layers as numbers, whatever form they are stored in."""

from __future__ import annotations

from typing import Any

from bitsandbytes.functional import dequantize_4bit
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from deployments.protocol.errors import BadRequest


def plain_weight(layer: nn.Module) -> Tensor:
    """The weight of a Linear or Conv2d, (out, in) or (out, in, kh, kw), where it is now.

    Of layers of torchao, bitsandbytes (4 bits) and GGUF files, what they stand for. Raises BadRequest where
    the weights are not at hand.
    """
    weight: Any = layer.weight
    if weight.is_meta:
        raise BadRequest("a DoRA needs the weights of the model, which are not at hand here", param="loras")
    plain: Any
    if getattr(weight, "quant_state", None) is not None:
        plain = dequantize_4bit(weight.data, weight.quant_state)
    elif isinstance(weight, GGUFParameter):
        plain = dequantize_gguf_tensor(weight).as_subclass(Tensor)
    elif is_traceable_wrapper_subclass(weight):  # of torchao
        plain = getattr(weight, "dequantize")()  # noqa: B009  the protocol of such classes does not list it
    else:
        plain = weight.detach()
    assert isinstance(plain, Tensor), "each of these is made of one tensor"
    return plain
