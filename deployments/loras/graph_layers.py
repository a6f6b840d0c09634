"""Linear layers of compiled blocks as one operator, which torch.compile does not look into.

A layer's LoRAs change from forward to forward. Code that is compiled for them would be compiled again, or end
the graph, in every layer. The operator is a call out of the compiled code, as a matrix product is anyway;
what it computes may change freely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]

_forwards: dict[int, Forward] = {}  # by address of the weight: all that a graph may say of a layer


@torch.library.custom_op("weft::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """What the layer with this weight computes now. x: (..., in); (..., out)."""
    return _forwards[weight.data_ptr()](x)


@linear.register_fake
def _linear_shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class GraphLayers:
    """The layers of one model that are operators in compiled code."""

    def __init__(self) -> None:
        self._before: dict[nn.Module, Forward | None] = {}  # own forwards of the instances

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self._before

    def add(self, layers: Iterable[nn.Linear]) -> None:
        """Make operators of these layers, which compute what they did."""
        for layer in layers:
            self._before[layer] = vars(layer).get("forward")
            self.set_forward(layer, layer.forward)
            vars(layer)["forward"] = MethodType(_call_operator, layer)

    def plain(self, layer: nn.Module) -> tuple[Forward, bool]:
        """What the layer computed before it was an operator, and whether the instance had that of its own."""
        before = self._before[layer]
        return (before, True) if before is not None else (MethodType(type(layer).forward, layer), False)

    def set_forward(self, layer: nn.Module, forward: Forward) -> None:
        """What the layer computes from now on."""
        _forwards[_address(layer)] = forward

    def clear(self) -> None:
        """Restore all layers."""
        for layer, before in self._before.items():
            del _forwards[_address(layer)]
            if before is None:
                del vars(layer)["forward"]
            else:
                vars(layer)["forward"] = before
        self._before.clear()


def _call_operator(layer: nn.Linear, x: Tensor) -> Tensor:
    output: Tensor = linear(x, layer.weight)
    return output


def _address(layer: nn.Module) -> int:
    assert isinstance(layer.weight, Tensor), "a Linear has one"
    return layer.weight.data_ptr()
