"""All weights of a module in one block of the host's memory, which one copy brings to a device."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

ALIGNMENT = 256  # bytes

Place = tuple[dict[str, Any], str]  # a module's parameters or buffers, and the name there
Build = Callable[[Sequence[Tensor]], Tensor]  # a weight from the plain tensors that it consists of


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a plain tensor is in the block."""

    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, block: Tensor) -> Tensor:
        flat = block[self.start : self.start + self.nbytes].view(self.dtype)
        return flat.as_strided(self.shape, self.strides)


@dataclass(frozen=True, slots=True)
class _Weight:
    """A parameter or buffer, and where it is used: modules may share one."""

    places: Sequence[Place]
    layouts: Sequence[_Layout]
    build: Build


class PackedWeights:
    """The parameters and buffers of one module and of those in it, which hold those on the host at first.

    For one thread at a time.
    """

    def __init__(self, module: nn.Module, *, pin: bool) -> None:
        """pin: in pinned memory, from which a GPU copies while the host goes on."""
        self.size_bytes = 0
        self._weights: list[_Weight] = []
        originals: list[tuple[_Layout, Tensor]] = []
        for weight, places in weights_of(module):
            tensors, build = _taken_apart(weight)
            layouts = [self._add(tensor) for tensor in tensors]
            originals += zip(layouts, tensors, strict=True)
            self._weights.append(_Weight(places, layouts, build))
        self._host = torch.empty(self.size_bytes, dtype=torch.uint8, pin_memory=pin)
        for layout, tensor in originals:
            layout.view(self._host).copy_(tensor)
        self._on_host = self.weights_in(self._host)
        self.use_host()

    def copy_to(self, block: Tensor) -> None:
        """Queue a copy to these bytes of a device on its current stream; a GPU's host does not wait."""
        block[: self.size_bytes].copy_(self._host, non_blocking=True)

    def weights_in(self, block: Tensor) -> list[Tensor]:
        """The weights whose bytes are in this block, for `use`."""
        return [one.build([layout.view(block) for layout in one.layouts]) for one in self._weights]

    def use(self, weights: Sequence[Tensor]) -> None:
        """Have the modules compute with these weights."""
        for one, weight in zip(self._weights, weights, strict=True):
            for container, name in one.places:
                container[name] = weight

    def use_host(self) -> None:
        """Have the modules hold the weights on the host."""
        self.use(self._on_host)

    def _add(self, tensor: Tensor) -> _Layout:
        start = self.size_bytes
        self.size_bytes += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return _Layout(start, tensor.nbytes, tensor.dtype, tuple(tensor.shape), _strides_without_gaps(tensor))


def weights_of(module: nn.Module) -> list[tuple[Tensor, list[Place]]]:
    """Each parameter and buffer with all its places."""
    found: dict[int, tuple[Tensor, list[Place]]] = {}
    for part in module.modules():
        containers: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)  # noqa: SLF001  no setter takes a weight as it is
        for container in containers:
            for name, weight in container.items():
                if weight is not None:
                    found.setdefault(id(weight), (weight, []))[1].append((container, name))
    return list(found.values())


def _strides_without_gaps(tensor: Tensor) -> tuple[int, ...]:
    """Its own strides, such as those of channels_last, unless rows overlap or lie apart."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() and reach == tensor.numel():
        return tensor.stride()
    return tuple(math.prod(tensor.shape[i + 1 :]) for i in range(tensor.ndim))


def _taken_apart(weight: Tensor) -> tuple[list[Tensor], Build]:
    """The plain tensors of a weight, and how it is made of others like them."""
    if is_traceable_wrapper_subclass(weight):  # of torchao
        names, context = weight.__tensor_flatten__()
        kind, shape, strides = type(weight), weight.shape, weight.stride()
        is_parameter = isinstance(weight, nn.Parameter)

        def wrapped(tensors: Sequence[Tensor]) -> Tensor:
            inner = dict(zip(names, tensors, strict=True))
            made: Tensor = kind.__tensor_unflatten__(inner, context, shape, strides)
            return nn.Parameter(made, requires_grad=False) if is_parameter else made

        return [getattr(weight, name) for name in names], wrapped
    if type(weight) is nn.Parameter:
        return [weight], lambda tensors: nn.Parameter(tensors[0], requires_grad=False)
    if type(weight) is Tensor:
        return [weight], lambda tensors: tensors[0]
    return _with_attributes(weight)


def _with_attributes(weight: Tensor) -> tuple[list[Tensor], Build]:
    """A weight of bitsandbytes or of a GGUF file: a tensor of bytes with attributes, such as a `quant_state`
    that has tensors too."""
    kind, attributes = type(weight), dict(vars(weight))
    state = attributes.get("quant_state")
    states = [one for one in (state, getattr(state, "state2", None)) if one is not None]
    names = [[name for name, value in vars(one).items() if isinstance(value, Tensor)] for one in states]
    tensors = [Tensor._make_subclass(Tensor, weight)]  # noqa: SLF001  the way of both libraries
    tensors += [getattr(one, name) for one, own in zip(states, names, strict=True) for name in own]

    def build(others: Sequence[Tensor]) -> Tensor:
        made: Tensor = Tensor._make_subclass(kind, others[0])  # noqa: SLF001
        vars(made).update(attributes)
        copies = [copy.copy(one) for one in states]
        rest = iter(others[1:])
        for one, own in zip(copies, names, strict=True):
            vars(one).update((name, next(rest)) for name in own)
        if copies:
            vars(made)["quant_state"] = copies[0]
        if len(copies) > 1:
            copies[0].state2 = copies[1]
        return made

    return tensors, build
