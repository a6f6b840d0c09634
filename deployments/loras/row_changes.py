"""What LoKr and DoRA change in a layer, for one row of a batch at a time: no row depends on another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from deployments.lora_format.layer_names import LayerKey
from deployments.loras.joint_linear import LoraLayer
from deployments.loras.lora_set import LoraSet, RowChange

Unit = tuple[LoraSet, int, int]  # a LoRA set, its first row and their number


class RowChanges:
    """The rows of one forward that have changes which are of no low rank."""

    def __init__(self, batch_size: int, units: Sequence[Unit]) -> None:
        self._batch_size = batch_size
        self._units = [unit for unit in units if unit[0].row_changes]

    def touch(self, key: LayerKey) -> bool:
        """Whether a row of the batch has one in this layer."""
        return any(key in lora_set.row_changes for lora_set, _, _ in self._units)

    def apply(self, layer: LoraLayer, x: Tensor, output: Tensor) -> None:
        """Change the layer's own output in place, before products of low rank are added to it.

        x, output: (batch size * k, ...): k frames of a video may be folded into a row.
        """
        frames = x.shape[0] // self._batch_size
        for row, change in self._rows(layer.key):
            own = slice(row * frames, (row + 1) * frames)
            change_row(layer, change, x[own], output[own])

    def _rows(self, key: LayerKey) -> Iterator[tuple[int, RowChange]]:
        for lora_set, start, rows in self._units:
            change = lora_set.row_changes.get(key)
            if change is not None:
                yield from ((row, change) for row in range(start, start + rows))


def change_row(layer: LoraLayer, change: RowChange, x: Tensor, output: Tensor) -> None:
    """Change the output of one row in place. x: (k, ..., in) or (k, in, H, W); output: of the layer for x."""
    module = layer.module
    by_channel = _Channels(1 if isinstance(module, nn.Conv2d) else -1, output.ndim)
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor), "of a Linear or Conv2d"
    offset = 0.0 if bias is None else by_channel.shaped(bias)
    if change.gain is not None:
        output.copy_((output.float() - offset) * by_channel.shaped(change.gain) + offset)
    for one in change.inputs:
        added = layer.plain(by_channel.scaled(x, one.column_scale)).float() - offset
        output += by_channel.scaled(added, one.row_scale).to(output.dtype)
    for product in change.products:
        given = by_channel.scaled(x, product.column_scale)
        if isinstance(module, nn.Conv2d):
            added = product.convolution(module, given)
        else:
            added = product.linear(given.reshape(-1, given.shape[-1])).view(output.shape)
        output.add_(by_channel.scaled(added, product.row_scale), alpha=product.scale)


@dataclass(frozen=True, slots=True)
class _Channels:
    """Where a layer's inputs and outputs have their channels."""

    dim: int  # -1 of a Linear, 1 of a convolution
    ndim: int

    def shaped(self, values: Tensor) -> Tensor:
        """(channels,) as float32, to be multiplied with or added to inputs or outputs."""
        return values.float() if self.dim == -1 else values.float().view(-1, *(1,) * (self.ndim - 2))

    def scaled(self, values: Tensor, scale: Tensor | None) -> Tensor:
        """values times scale by channel, rounded once."""
        return values if scale is None else (values.float() * self.shaped(scale)).to(values.dtype)
