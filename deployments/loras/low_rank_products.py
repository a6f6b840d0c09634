"""The low-rank products of several rows and layers in one call, and whether each row gets the bits that it
gets alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from cachetools import FIFOCache
from torch import Tensor, nn
from torch.nn import functional

from deployments.loras.product_trials import Pairs, have_same_bits

MAX_TRIAL_RESULTS = 4096  # sizes whose outcome is kept


@dataclass(frozen=True, slots=True)
class Products:
    """The products of adjacent slots in layers that read the same input.

    S slots of several rows each, of t tokens each; M layers, in classes of C layers with outputs of one
    width. Ranks are padded with zeros to R.
    """

    a: Tensor  # (S, R, M, in)
    b: Sequence[Tensor]  # for each class (C, S, R, out)
    ranks: tuple[int, ...]  # of each slot alone
    rows: int  # of each slot

    @property
    def is_one(self) -> bool:
        """Whether they are one row's in one layer, as it has them alone."""
        return self.a.shape[::2] == (1, 1) and self.rows == 1 and self.ranks == self.a.shape[1:2]

    def size(self, x: Tensor) -> Hashable:
        """Equal for products that are computed by the same kernels. x: their input."""
        b_shapes = tuple((one.shape, one.is_contiguous()) for one in self.b)
        return self.a.shape, b_shapes, self.ranks, self.rows, x.shape, x.dtype, x.device


def add_linear(outs: Sequence[Tensor], x: Tensor, products: Products) -> None:
    """Add b @ a @ x of all slots and layers to their outputs.

    outs: for each class (C, S, t, out), contiguous unless C is 1. x: (S, t, in); t: the tokens of a slot's
    rows together. The first product is one for all layers, the second one for each class; adding within it
    saves a pass over the output, a quarter of the cost. The first is up to a tenth faster with x on the right
    than with x on the left.
    """
    slots, rank, layers, width = products.a.shape
    tokens = x.shape[1]
    a = products.a.reshape(slots, rank * layers, width)
    if layers == 1:
        inner = torch.bmm(a, x.transpose(1, 2))  # (S, R, t)
        outs[0][0].baddbmm_(inner.transpose(1, 2), products.b[0][0])
        return
    # in an order in which all layers and slots of a class are a fixed number of values apart
    buffer = torch.empty((rank, layers * slots, tokens), dtype=x.dtype, device=x.device)
    torch.bmm(a, x.transpose(1, 2), out=buffer.view(rank * layers, slots, tokens).transpose(0, 1))
    first = 0
    for out, b in zip(outs, products.b, strict=True):
        inner = buffer[:, first : first + len(out) * slots].permute(1, 2, 0)  # (C * S, t, R)
        out.view(-1, *out.shape[2:]).baddbmm_(inner, b.view(-1, *b.shape[2:]))
        first += len(out) * slots


def add_linear_one_by_one(outs: Sequence[Tensor], x: Tensor, products: Products) -> None:
    """The same for each row and layer alone: what defines the bits of a row."""
    for slot, tokens, rank in _single_rows(x, products):
        first = 0
        for out, b in zip(outs, products.b, strict=True):
            for index in range(len(out)):
                one = Products(
                    products.a[slot : slot + 1, :rank, first + index : first + index + 1].contiguous(),
                    [b[index : index + 1, slot : slot + 1, :rank].contiguous()],
                    (rank,),
                    1,
                )
                own = out[index : index + 1, slot : slot + 1, tokens]
                add_linear([own], x[slot : slot + 1, tokens], one)
            first += len(out)


def add_convolution(layer: nn.Conv2d, out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> None:
    """out (n, k, out, H', W') += b of the convolution of x (n, k, in, H, W) with a (n, R, in, kh, kw).

    Rows are the groups of one convolution; b is (n, R, out).
    """
    n, k, channels = x.shape[:3]
    folded = x.transpose(0, 1).reshape(k, n * channels, *x.shape[3:]).contiguous()
    inner = functional.conv2d(
        folded, a.flatten(0, 1), None, layer.stride, layer.padding, layer.dilation, groups=n
    )  # (k, n * R, H', W')
    height, width = inner.shape[2:]
    inner = inner.reshape(k, n, -1, height * width).transpose(0, 1).contiguous()  # (n, k, R, H' * W')
    b = b.transpose(1, 2)
    if k == 1:
        out.view(n, -1, height * width).baddbmm_(b, inner[:, 0])
    else:
        out += torch.matmul(b[:, None], inner).view(out.shape)


class BatchInvariance:
    """Which products give every row the bits that it gets alone: tried with noise, once per size."""

    def __init__(self) -> None:
        self._results: FIFOCache[Hashable, bool] = FIFOCache(MAX_TRIAL_RESULTS)

    def holds(self, x: Tensor, products: Products) -> bool:
        """Whether these products may be computed at once. x: (S, t, in)."""
        if products.is_one:
            return True
        size = products.size(x)
        result = self._results.get(size)
        if result is None:
            result = self._results[size] = is_batch_invariant(x, products)
        return result


def is_batch_invariant(x: Tensor, products: Products) -> bool:
    """Whether all rows and layers together have the bits of each alone, on noise like x (S, t, in)."""
    generator = torch.Generator(x.device).manual_seed(0)

    def noise(shape: Iterable[int]) -> Tensor:
        return torch.randn(*shape, generator=generator, device=x.device).to(x.dtype)

    def trial() -> Pairs:
        outs = [noise((*b.shape[:2], x.shape[1], b.shape[3])) for b in products.b]
        apart, own_x = [out.clone() for out in outs], noise(x.shape)
        tried = _noise_like(products, noise)
        add_linear(outs, own_x, tried)
        add_linear_one_by_one(apart, own_x, tried)
        return zip(outs, apart, strict=True)

    return have_same_bits("products of LoRAs", trial)


def _single_rows(x: Tensor, products: Products) -> Iterator[tuple[int, slice, int]]:
    """Slot, its tokens and its own rank, for each row."""
    tokens = x.shape[1] // products.rows
    for slot, rank in enumerate(products.ranks):
        for row in range(products.rows):
            yield slot, slice(row * tokens, (row + 1) * tokens), rank


def _noise_like(products: Products, noise: Callable[[Iterable[int]], Tensor]) -> Products:
    """Products of noise, padded with zeros as these are."""
    a, b = noise(products.a.shape), [noise(one.shape) for one in products.b]
    for slot, rank in enumerate(products.ranks):
        a[slot, rank:] = 0
        for one in b:
            one[:, slot, rank:] = 0
    return Products(a, b, products.ranks, products.rows)
