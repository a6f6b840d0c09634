"""The low-rank products of several rows in one call, and whether each row gets the bits that it gets
alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch
from cachetools import FIFOCache
from torch import Tensor, nn
from torch.nn import functional

MAX_TRIAL_RESULTS = 4096  # sizes whose outcome is kept
MAX_TRIALS = 64  # of one size
MIN_COMPARED_16_BIT = 2**20  # values compared before a product of 16-bit tensors counts as batch-invariant

AddProducts = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows of a batch whose LoRA sets have the same rank in a layer: what one batched product computes."""

    rows: slice | Tensor  # a slice where they are adjacent, else indices (n,)
    count: int
    a: Tensor  # (n, R, in) or (n, R, in, kh, kw)
    b: Tensor  # (n, out, R)


def add_linear(_layer: nn.Module, out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> None:
    """out (n, k, ..., out) += b @ a @ x for x (n, k, ..., in), a (n, R, in), b (n, out, R).

    Adding within the second product saves a pass over the output, a quarter of the cost. The first product is
    up to a tenth faster with x on the right than with x on the left.
    """
    n = x.shape[0]
    inner = torch.bmm(a, x.reshape(n, -1, x.shape[-1]).contiguous().transpose(1, 2))  # (n, R, k * ...)
    out.view(n, -1, out.shape[-1]).baddbmm_(inner.transpose(1, 2), b.transpose(1, 2))


def add_convolution(layer: nn.Module, out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> None:
    """out (n, k, out, H', W') += b of the convolution of x (n, k, in, H, W) with a (n, R, in, kh, kw).

    Rows are the groups of one convolution; b is (n, out, R).
    """
    assert isinstance(layer, nn.Conv2d), "chosen by the caller"
    n, k, channels = x.shape[:3]
    folded = x.transpose(0, 1).reshape(k, n * channels, *x.shape[3:]).contiguous()
    inner = functional.conv2d(
        folded, a.flatten(0, 1), None, layer.stride, layer.padding, layer.dilation, groups=n
    )  # (k, n * R, H', W')
    height, width = inner.shape[2:]
    inner = inner.reshape(k, n, -1, height * width).transpose(0, 1).contiguous()  # (n, k, R, H' * W')
    if k == 1:
        out.view(n, -1, height * width).baddbmm_(b, inner[:, 0])
    else:
        out += torch.matmul(b[:, None], inner).view(out.shape)


class BatchInvariance:
    """Which batched products give every row the bits that it gets alone: tried with noise, once per size."""

    def __init__(self) -> None:
        self._results: FIFOCache[Hashable, bool] = FIFOCache(MAX_TRIAL_RESULTS)

    def holds(self, add: AddProducts, layer: nn.Module, out: Tensor, x: Tensor, group: RowGroup) -> bool:
        """Whether this product of the group's rows may be computed at once. out: (rows, k, ...), x
        likewise."""
        if group.count == 1:
            return True
        if isinstance(layer, nn.Conv2d):  # one group and several take different ways through a convolution
            return False
        key = (out.shape[1:], x.shape[1:], x.dtype, x.device, group.a.shape, group.b.shape)
        result = self._results.get(key)
        if result is None:
            result = self._results[key] = is_batch_invariant(add, layer, out, x, group)
        return result


def is_batch_invariant(add: AddProducts, layer: nn.Module, out: Tensor, x: Tensor, group: RowGroup) -> bool:
    """Whether the group's rows together have the bits of each alone, on as much noise as a proof needs.

    In float32 another order of summation shows at once. Rounding to 16 bits hides it in all but one value of
    some 50,000; sizes too small to compare enough values in MAX_TRIALS count as not invariant.
    """
    n, generator = group.count, torch.Generator(x.device).manual_seed(0)

    def noise(shape: Iterable[int]) -> Tensor:
        return torch.randn(*shape, generator=generator, device=x.device).to(x.dtype)

    compared, enough = 0, 1 if x.dtype is torch.float32 else MIN_COMPARED_16_BIT
    for _ in range(MAX_TRIALS):
        together = noise((n, *out.shape[1:]))
        apart = together.clone()
        inputs = [noise((n, *x.shape[1:])), noise(group.a.shape), noise(group.b.shape)]
        add(layer, together, *inputs)
        for i in range(n):
            add(layer, *(part[i : i + 1] for part in (apart, *inputs)))
        if not torch.equal(together, apart):
            return False
        compared += together.numel()
        if compared >= enough:
            return True
    return False
