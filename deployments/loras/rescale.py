"""How a DoRA rescales the weight of a layer: every row or column to a length of its own.

DoRA (arXiv 2402.09353) makes the changed weight W + D row by row as long as its magnitude says. The lengths
of W + D are computed from the weights of the model once, when the adapter is loaded. For weights other than 1
each trainer's own arithmetic counts: peft rescales W + weight * D; files with `dora_scale` (kohya, LyCORIS,
OneTrainer, ComfyUI) lead from W to what they are at 1 in proportion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deployments.lora_format.layer_names import LayerKey
from deployments.lora_format.tensor_groups import Rescaling
from deployments.loras.layer_change import LayerFactors

ReadWeight = Callable[[nn.Module], Tensor]  # of a Linear or Conv2d
EPS = torch.finfo(torch.float32).eps  # LyCORIS adds it to lengths


@dataclass(frozen=True, slots=True)
class Magnitude:
    """The lengths that a file gives to the rows, or the columns, of one layer's changed weight."""

    lengths: Tensor  # (out,) or (in,), float32
    of_inputs: bool  # one for each input; of a convolution for each input channel
    rescaling: Rescaling


@dataclass(frozen=True, slots=True)
class Rescale:
    """A magnitude and the lengths that it replaces: those of W + w * D squared are
    own + 2 * w * mixed + w * w * change. All are (out,) or (in,), float32, on the device."""

    magnitude: Magnitude
    own: Tensor
    mixed: Tensor
    change: Tensor

    def factor(self, weight: float) -> Tensor:
        """What the rows or columns of W + weight * D are multiplied with."""
        squares = self.own + 2 * weight * self.mixed + weight * weight * self.change
        return self.magnitude.lengths.to(squares.device) / (squares.clamp_min(0).sqrt() + EPS)


def stored_weight(layer: nn.Module) -> Tensor:
    """The weight of a Linear or Conv2d that stores it as numbers."""
    assert isinstance(layer.weight, Tensor), "a Linear or a Conv2d has one"
    return layer.weight.detach()


def rescale(magnitude: Magnitude, weight: Tensor, factors: LayerFactors) -> Rescale:
    """Measure the rows or columns of a layer's weight with and without the change. factors: on the device."""
    change = factors.dense()
    weight = weight.to(change.device, torch.float32).view(change.shape)
    dims = [dim for dim in range(weight.ndim) if dim != int(magnitude.of_inputs)]
    return Rescale(
        magnitude,
        (weight * weight).sum(dims),
        (weight * change).sum(dims),
        (change * change).sum(dims),
    )


def rescales(
    magnitudes: Mapping[LayerKey, Magnitude],
    factors: Mapping[LayerKey, LayerFactors],
    parts: Mapping[str, nn.Module],
    read_weight: ReadWeight = stored_weight,
) -> dict[LayerKey, Rescale]:
    """All of an adapter. Runs between two forwards: weights that live on the host move while one runs."""
    return {
        key: rescale(one, read_weight(parts[key[0]].get_submodule(key[1])), factors[key])
        for key, one in magnitudes.items()
    }
