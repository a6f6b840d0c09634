"""What a LoRA, LoHa, LoKr or DoRA adds to the output of one layer, as tensors.

A LoHa's element-wise product of two products of ranks r and s is a product of rank r * s: its factors are
those of each pair of ranks, multiplied element by element. So is what Tucker's core joins a product of two
factors. Both are added as every LoRA is. A Kronecker product has no low rank, and is computed by its factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

Factors = Mapping[str, Tensor]  # by role, see lora_format/tensor_groups.py


@dataclass(frozen=True, slots=True)
class LowRankFactors:
    """What a LoRA adds to one layer: scale * b @ (a @ x).

    a: (rank, in) for a Linear, (rank, in, kh, kw) for a Conv2d. b: (out, rank), its columns one after the
    other in memory, so that factors of several ranks can be stacked. Both have the layer's dtype.
    """

    a: Tensor
    b: Tensor
    scale: float  # alpha / rank
    row_scale: Tensor | None = None  # (out,), float32: of the rows of b, besides
    column_scale: Tensor | None = None  # (in,), float32: of the inputs of a

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Contiguous, for copying."""
        return self.a, self.b.t()

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """The same with copies of its tensors."""
        return replace(self, a=tensors[0], b=tensors[1].t())

    def dense(self) -> Tensor:
        """All that is added to the layer's weight, without the row and column scales: float32, (out, ...)."""
        flat = self.b.float() @ self.a.flatten(1).float()
        return (self.scale * flat).view(-1, *self.a.shape[1:])


@dataclass(frozen=True, slots=True)
class KroneckerFactors:
    """What a LoKr adds to one layer: scale times the Kronecker product of left and right, applied to x.

    left: (o1, i1). right: (o2, i2) for a Linear, (o2, i2, kh, kw) for a Conv2d. Both have the layer's dtype.
    """

    left: Tensor
    right: Tensor
    scale: float
    rows: tuple[int, int]  # of the o1 * o2 outputs, those that are this layer's
    swapped: bool = False  # the first half of them is the layer's second half
    row_scale: Tensor | None = None  # as LowRankFactors
    column_scale: Tensor | None = None

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Contiguous, for copying."""
        return self.left, self.right

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """The same with copies of its tensors."""
        return replace(self, left=tensors[0], right=tensors[1])

    def dense(self) -> Tensor:
        """As LowRankFactors."""
        left = self.left.float().view(*self.left.shape, *(1 for _ in self.right.shape[2:]))
        whole = torch.kron(left, self.right.float().contiguous())
        return self.scale * _own_rows(whole, self.rows, swapped=self.swapped)

    def linear(self, x: Tensor) -> Tensor:
        """(tokens, out) of x (tokens, in), without the scale."""
        (_, columns), (_, inner) = self.left.shape, self.right.shape
        mixed = torch.matmul(x.reshape(-1, columns, inner), self.right.t())  # (tokens, i1, o2)
        whole = torch.matmul(self.left, mixed).flatten(1)
        return _own_columns(whole, self.rows, swapped=self.swapped)

    def convolution(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        """(n, out, H', W') of x (n, in, H, W), without the scale."""
        rows, columns = self.left.shape
        folded = x.reshape(-1, self.right.shape[1], *x.shape[2:])  # (n * i1, i2, H, W)
        mixed = functional.conv2d(folded, self.right, None, layer.stride, layer.padding, layer.dilation)
        size = mixed.shape[2:]
        whole = torch.matmul(self.left, mixed.reshape(-1, columns, mixed[0].numel()))
        return _own_columns(
            whole.view(-1, rows * self.right.shape[0], *size), self.rows, swapped=self.swapped
        )


LayerFactors = LowRankFactors | KroneckerFactors


def low_rank(
    factors: Factors, weight: Sequence[int], rows: tuple[int, int], *, swapped: bool, dtype: torch.dtype
) -> LowRankFactors:
    """Those of a LoRA, or of a LoHa, for a layer with a weight of this shape; their scale is 1.

    rows: of the outputs of the factors, those that are the layer's.
    """
    a, b = _lora(factors) if "down" in factors else _loha(factors)
    rank = a.shape[0]
    own = _own_rows(b.reshape(-1, rank), rows, swapped=swapped)
    return LowRankFactors(
        a.reshape(rank, *weight[1:]).to(dtype).contiguous(), own.to(dtype).t().contiguous().t(), 1.0
    )


def kronecker(
    factors: Factors, weight: Sequence[int], rows: tuple[int, int], *, swapped: bool, dtype: torch.dtype
) -> KroneckerFactors:
    """Those of a LoKr, as low_rank."""
    left, right = (_kronecker_factor(factors, number) for number in (1, 2))
    left = left.flatten(1)
    shape = (right.shape[0], weight[1] // left.shape[1], *weight[2:])
    return KroneckerFactors(
        left.to(dtype).contiguous(), right.reshape(shape).to(dtype).contiguous(), 1.0, rows, swapped
    )


def _lora(factors: Factors) -> tuple[Tensor, Tensor]:
    down, up, mid = factors["down"], factors["up"], factors.get("mid")
    if mid is None:
        return down, up
    core = torch.einsum("pqkl,qi->pikl", mid.float(), down.flatten(1).float())
    return core, up.reshape(up.shape[0], -1)


def _loha(factors: Factors) -> tuple[Tensor, Tensor]:
    (a, b), (c, d) = (
        _as_product(factors, f"hada_w{number}_a", f"hada_w{number}_b", f"hada_t{number}") for number in (1, 2)
    )
    ranks = a.shape[0] * c.shape[0]
    return (
        (a[:, None] * c[None]).reshape(ranks, -1),
        (b[:, :, None] * d[:, None]).reshape(len(b), ranks),
    )


def _kronecker_factor(factors: Factors, number: int) -> Tensor:
    whole = factors.get(f"lokr_w{number}")
    if whole is not None:
        return whole.float()
    a, b = _as_product(factors, f"lokr_w{number}_a", f"lokr_w{number}_b", f"lokr_t{number}")
    return b @ a


def _as_product(factors: Factors, left: str, right: str, core: str) -> tuple[Tensor, Tensor]:
    """a (rank, in) and b (out, rank) of a matrix b @ a, with the kernel flattened into its inputs."""
    out, into = factors[left].float(), factors[right].flatten(1).float()
    if core not in factors:
        return into, out
    joined = torch.einsum("pqkl,qi->pikl", factors[core].float(), into)
    return joined.flatten(1), out.t()


def _own_rows(tensor: Tensor, rows: tuple[int, int], *, swapped: bool) -> Tensor:
    own = tensor[slice(*rows)]
    return torch.cat(own.chunk(2)[::-1]) if swapped else own


def _own_columns(tensor: Tensor, rows: tuple[int, int], *, swapped: bool) -> Tensor:
    own = tensor[:, slice(*rows)]
    return torch.cat(own.chunk(2, dim=1)[::-1], dim=1) if swapped else own
