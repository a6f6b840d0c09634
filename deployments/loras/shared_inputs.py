"""Which linear layers of a module read the same tensor, such as q, k and v: learnt while it runs once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deployments.lora_format.layer_names import LayerKey

_UNKNOWN: Mapping[LayerKey, Sequence[LayerKey]] = {}


@dataclass(slots=True)
class _Input:
    """One tensor, and the layers that read it."""

    tensor: weakref.ref[Tensor]
    layers: list[LayerKey] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)  # of its values, each time it was read


class InputRecorder:
    """Notes what each layer reads in one forward."""

    def __init__(self) -> None:
        self._inputs: list[_Input] = []
        self._latest: dict[int, _Input] = {}  # by id of a tensor, which is used again once it is freed
        self._calls: dict[LayerKey, int] = {}

    def note(self, layer: LayerKey, x: Tensor) -> None:
        """Called when a layer reads x."""
        self._calls[layer] = self._calls.get(layer, 0) + 1
        entry = self._latest.get(id(x))
        if entry is None or entry.tensor() is not x:
            entry = self._latest[id(x)] = _Input(weakref.ref(x))
            self._inputs.append(entry)
        entry.layers.append(layer)
        entry.sums.append(x.sum(dtype=torch.float32))

    def groups(self) -> Iterator[list[LayerKey]]:
        """The layers of each tensor that several read. Left out are those that run more than once, and
        tensors that changed between two reads."""
        for entry in self._inputs:
            layers = [layer for layer in entry.layers if self._calls[layer] == 1]
            sums = torch.stack(entry.sums)
            if len(layers) > 1 and torch.equal(sums, sums[:1].expand_as(sums)):
                yield layers


class SharedInputs:
    """The layers of a model that read the same tensor, by part. Used from the engine's thread."""

    def __init__(self) -> None:
        self._groups: dict[str, Mapping[LayerKey, Sequence[LayerKey]]] = {}
        self._recorders: dict[str, InputRecorder] = {}

    def begin(self, part: str, width: Callable[[LayerKey], int]) -> InputRecorder | None:
        """Called as a forward begins: what it has to note its inputs with, unless they are known.

        width: of a layer's output. Layers with outputs of one width become adjacent in their group.
        """
        if part in self._groups:
            return None
        recorder = self._recorders.pop(part, None)
        if recorder is None:
            recorder = self._recorders[part] = InputRecorder()
            return recorder
        groups = [sorted(layers, key=width) for layers in recorder.groups()]
        self._groups[part] = {layer: layers for layers in groups for layer in layers}
        return None

    def groups(self, part: str) -> Mapping[LayerKey, Sequence[LayerKey]]:
        """By each layer of the part that reads what others read too, all that do."""
        return self._groups.get(part, _UNKNOWN)

    def separate(self, layer: LayerKey) -> None:
        """Take apart the group of a layer that read another tensor."""
        groups = self.groups(layer[0])
        layers = groups.get(layer, ())
        self._groups[layer[0]] = {one: group for one, group in groups.items() if one not in layers}

    def forget(self, part: str) -> None:
        """Learn the groups of this part again: it has more layers that are noted."""
        self._groups.pop(part, None)
        self._recorders.pop(part, None)
