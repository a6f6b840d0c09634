"""The LoRAs of one request with their weights, layer by layer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from deployments.lora_format.layer_names import LayerKey
from deployments.loras.source import LowRankFactors

RANKS = (8, 16, 32, 64, 128, 256, 512)  # the sum of a request's ranks in a layer is padded to one of these


@dataclass(frozen=True, slots=True)
class LowRankSum:
    """What one request adds to one layer: the sum of scale * b @ (a @ x) over its LoRAs.

    The tensors are the adapters' own; scale holds the request's weight too.
    """

    parts: tuple[LowRankFactors, ...]

    @property
    def rank(self) -> int:
        """One of RANKS: the ranks of the parts fit into it side by side."""
        ranks = sum(part.a.shape[0] for part in self.parts)
        return next(rank for rank in RANKS if rank >= ranks)


@dataclass(frozen=True, slots=True, eq=False)
class LoraSet:
    """The LoRAs of one request. Compared by identity: the rows of a batch that share it have the same
    LoRAs."""

    layers: Mapping[LayerKey, LowRankSum]
    label: Hashable = ()  # ids and weights; sets with equal labels change a model in the same way

    @property
    def touches_text(self) -> bool:
        """Whether it changes a text encoder, and with it the embeddings of a prompt."""
        return any(part.startswith("text_encoder") for part, _ in self.layers)


def combine(
    adapters: Sequence[tuple[Mapping[LayerKey, LowRankFactors], float]], label: Hashable = ()
) -> LoraSet:
    """Adapters on one device and their weights as one set; no tensor is copied.

    The sum of the ranks in a layer is at most RANKS[-1]: MAX_LORAS of MAX_RANK.
    """
    layers: dict[LayerKey, tuple[LowRankFactors, ...]] = {}
    for factors, weight in adapters:
        for layer, one in factors.items():
            layers[layer] = (*layers.get(layer, ()), replace(one, scale=weight * one.scale))
    return LoraSet({layer: LowRankSum(parts) for layer, parts in layers.items()}, label)
