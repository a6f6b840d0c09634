"""The LoRAs of one request with their weights, combined into one low-rank pair per layer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from deployments.loras.source import LayerKey, LowRankFactors

RANKS = (8, 16, 32, 64, 128, 256, 512)  # the sum of a request's ranks in a layer is padded to one of these


@dataclass(frozen=True, slots=True)
class LowRankPair:
    """What one request adds to one layer: b @ (a @ x), with weights and alphas multiplied into b.

    a: (R, in) for a Linear, (R, in, kh, kw) for a Conv2d; b: (out, R); R is one of RANKS.
    """

    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LoraSet:
    """The LoRAs of one request. Compared by identity: the rows of a batch that share it have the same
    LoRAs."""

    pairs: Mapping[LayerKey, LowRankPair]
    label: Hashable = ()  # ids and weights; sets with equal labels change a model in the same way

    @property
    def touches_text(self) -> bool:
        """Whether it changes a text encoder, and with it the embeddings of a prompt."""
        return any(part.startswith("text_encoder") for part, _ in self.pairs)


def combine(
    adapters: Sequence[tuple[Mapping[LayerKey, LowRankFactors], float]], label: Hashable = ()
) -> LoraSet:
    """Adapters on one device and their weights as one set: ranks side by side (they add up), padded with
    zeros.

    The sum of the ranks in a layer is at most RANKS[-1]: MAX_LORAS of MAX_RANK.
    """
    layers: dict[LayerKey, list[tuple[LowRankFactors, float]]] = {}
    for factors, weight in adapters:
        for layer, one in factors.items():
            layers.setdefault(layer, []).append((one, weight * one.scale))
    return LoraSet({layer: _joined(parts) for layer, parts in layers.items()}, label)


def _joined(parts: Sequence[tuple[LowRankFactors, float]]) -> LowRankPair:
    bs = [one.b if scale == 1 else (one.b.float() * scale).to(one.b.dtype) for one, scale in parts]
    a, b = parts[0][0].a, bs[0]
    if len(parts) > 1:
        a, b = torch.cat([one.a for one, _ in parts]), torch.cat(bs, dim=1)
    missing = next(rank for rank in RANKS if rank >= a.shape[0]) - a.shape[0]
    if missing:
        a = torch.cat([a, a.new_zeros(missing, *a.shape[1:])])
        b = functional.pad(b, (0, missing))
    return LowRankPair(a, b)
