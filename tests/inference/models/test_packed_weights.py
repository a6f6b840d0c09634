"""Weights in one block of memory are the weights that they were, wherever the block is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deployments.models.packed_weights import PackedWeights


class Mixed(nn.Module):
    """Weights of many dtypes and layouts, one of them shared."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.one = nn.Linear(7, 7, bias=False, dtype=torch.bfloat16)
        self.other = nn.Linear(7, 7, bias=False, dtype=torch.bfloat16)
        self.other.weight = self.one.weight
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("positions", torch.arange(5).expand(3, 5), persistent=False)
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("scale", torch.tensor(0.5, dtype=torch.float16))
        self.register_buffer("absent", None)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def test_all_weights_keep_their_values_and_layouts() -> None:
    module = Mixed()
    before = {name: (weight.clone(), weight.stride()) for name, weight in weights_of(module).items()}

    packed = PackedWeights(module, pin=False)
    block = torch.zeros(packed.size_bytes, dtype=torch.uint8)
    packed.copy_to(block)
    packed.use(packed.weights_in(block))

    after = weights_of(module)
    assert after.keys() == before.keys()
    for name, (value, strides) in before.items():
        assert torch.equal(after[name], value), name
        assert after[name].dtype is value.dtype
        assert after[name].stride() == strides or name == "positions"
        assert not after[name].requires_grad
    assert module.other.weight is module.one.weight
    own = block.untyped_storage().data_ptr()
    assert {weight.untyped_storage().data_ptr() for weight in after.values()} == {own}


def test_the_host_has_its_own_weights() -> None:
    module = nn.Linear(4, 4)
    packed = PackedWeights(module, pin=False)
    block = torch.zeros(packed.size_bytes, dtype=torch.uint8)

    packed.use(packed.weights_in(block))
    assert not module.weight.any()
    packed.use_host()
    assert module.weight.any()


def test_memory_is_that_of_the_weights() -> None:
    packed = PackedWeights(nn.Linear(256, 256, dtype=torch.float16), pin=False)

    assert packed.size_bytes == 2 * 256 * 256 + 2 * 256


def quantised_by_torchao() -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    linear = nn.Linear(64, 64, dtype=torch.bfloat16)
    quantize_(linear, Int8WeightOnlyConfig())
    return linear


def quantised_by_bitsandbytes() -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    linear: Any = Linear4bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4")
    return linear.to("cpu")  # type: ignore[no-any-return]


def of_a_gguf_file() -> nn.Module:
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    linear = GGUFLinear(64, 64, bias=False, compute_dtype=torch.bfloat16)
    raw = torch.randint(0, 8, (64, 2 * 34), dtype=torch.uint8)  # Q8_0: blocks of 32 with a scale of 2 bytes
    linear.weight = GGUFParameter(raw, quant_type=8)
    return linear


@pytest.mark.parametrize("make", [quantised_by_torchao, quantised_by_bitsandbytes, of_a_gguf_file])
def test_quantised_weights_can_be_copied(make: Any) -> None:
    module = make()
    x = torch.linspace(-1, 1, 64, dtype=torch.bfloat16).expand(3, 64)
    packed = PackedWeights(module, pin=False)
    with torch.inference_mode():
        on_host = module(x)
        block = torch.zeros(packed.size_bytes, dtype=torch.uint8)
        packed.copy_to(block)
        packed.use(packed.weights_in(block))

        assert torch.equal(module(x), on_host)
        block.zero_()
        assert not torch.equal(module(x), on_host), "it computes with the copy"
        packed.use_host()
        assert torch.equal(module(x), on_host)
