"""The LoRAs of one request with their weights, layer by layer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from deployments.lora_format.layer_names import LayerKey
from deployments.loras.layer_change import KroneckerFactors, LayerFactors, LowRankFactors
from deployments.loras.rescale import Rescale

# the sum of a request's ranks in a layer is padded to one of these
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

Adapters = Sequence[tuple[Mapping[LayerKey, LayerFactors], float]]


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


@dataclass(frozen=True, slots=True)
class InputChange:
    """What a DoRA that rescales inputs adds: row_scale * (W @ (column_scale * x))."""

    column_scale: Tensor  # (in,), float32
    row_scale: Tensor | None = None  # (out,), float32


@dataclass(frozen=True, slots=True)
class RowChange:
    """What one request changes in one layer beside products of low rank; computed for each of its rows
    alone."""

    gain: Tensor | None = None  # (out,), float32: factor of W @ x
    inputs: tuple[InputChange, ...] = ()
    products: tuple[KroneckerFactors, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class LoraSet:
    """The LoRAs of one request. Compared by identity: the rows of a batch that share it have the same
    LoRAs."""

    layers: Mapping[LayerKey, LowRankSum]
    label: Hashable = ()  # ids and weights; sets with equal labels change a model in the same way
    row_changes: Mapping[LayerKey, RowChange] = field(default_factory=dict)
    # of the model whose layers they change; None: any. A refiner has layers of the same names
    owner: object = None

    @property
    def changes_nothing(self) -> bool:
        """Whether it holds no layer at all."""
        return not self.layers and not self.row_changes

    @property
    def touches_text(self) -> bool:
        """Whether it changes a text encoder, and with it the embeddings of a prompt."""
        return any(part.startswith("text_encoder") for part, _ in (*self.layers, *self.row_changes))


def combine(
    adapters: Adapters,
    label: Hashable = (),
    rescales: Sequence[Mapping[LayerKey, Rescale]] = (),
    owner: object = None,
) -> LoraSet:
    """Adapters on one device and their weights as one set; no factor is copied.

    rescales: of each adapter, where one of them is a DoRA. The sum of the ranks in a layer is at most
    RANKS[-1]: MAX_LORAS of MAX_SUM_RANK.
    """
    sums: dict[LayerKey, _LayerSum] = {}
    for index, (factors, weight) in enumerate(adapters):
        own = rescales[index] if index < len(rescales) else {}
        for layer, one in factors.items():
            sums.setdefault(layer, _LayerSum()).add(one, weight, own.get(layer))
    return LoraSet(
        {layer: LowRankSum(tuple(one.low_rank)) for layer, one in sums.items() if one.low_rank},
        label,
        {layer: change for layer, one in sums.items() if (change := one.row_change) is not None},
        owner,
    )


@dataclass(slots=True)
class _LayerSum:
    """What the adapters of a request make of one layer, one after the other."""

    gain: Tensor | None = None
    inputs: list[InputChange] = field(default_factory=list)
    low_rank: list[LowRankFactors] = field(default_factory=list)
    products: list[KroneckerFactors] = field(default_factory=list)

    @property
    def row_change(self) -> RowChange | None:
        """None where all is of low rank."""
        if self.gain is None and not self.inputs and not self.products:
            return None
        return RowChange(self.gain, tuple(self.inputs), tuple(self.products))

    def add(self, factors: LayerFactors, weight: float, rescale: Rescale | None) -> None:
        """One adapter with its weight."""
        factors = replace(factors, scale=weight * factors.scale)
        if rescale is not None:
            factors = self._rescaled(factors, weight, rescale)
        if isinstance(factors, LowRankFactors):
            self.low_rank.append(factors)
        else:
            self.products.append(factors)

    def _rescaled(self, factors: LayerFactors, weight: float, rescale: Rescale) -> LayerFactors:
        """The factors of a DoRA; what it makes of the layer's own weight is noted, see rescale.py."""
        if rescale.magnitude.rescaling == "peft":  # it rescales all that adapters before it added, too
            factor = rescale.factor(weight)
            self.gain = factor if self.gain is None else self.gain * factor
            self.inputs = [replace(one, row_scale=_times(one.row_scale, factor)) for one in self.inputs]
            self.low_rank = [replace(one, row_scale=_times(one.row_scale, factor)) for one in self.low_rank]
            self.products = [replace(one, row_scale=_times(one.row_scale, factor)) for one in self.products]
            return replace(factors, row_scale=factor)
        factor = rescale.factor(1.0)
        if rescale.magnitude.of_inputs:
            self.inputs.append(InputChange(weight * (factor - 1)))
            return replace(factors, column_scale=factor)
        self.gain = weight * (factor - 1) + (1.0 if self.gain is None else self.gain)
        return replace(factors, row_scale=factor)


def _times(scale: Tensor | None, factor: Tensor) -> Tensor:
    return factor if scale is None else scale * factor
