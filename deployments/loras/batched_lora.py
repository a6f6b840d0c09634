"""Many LoRAs in one forward pass: every row gets the low-rank products of its own LoRA set, other rows
nothing.

The weights are not changed. The forward of each layer is replaced by one that reads which LoRA set each row
of the batch has (engine/lora_rows.py) and adds b @ (a @ x) to those rows (compare S-LoRA, arXiv 2311.03285,
and Punica, arXiv 2310.18547). Layers that read the same tensor are computed together when the first of them
is called (lora_forward.py). What a row gets depends on the row and its LoRA set only: ranks are padded to
fixed sizes, and in deterministic mode products are computed at once only in sizes in which a trial gave every
row the bits that it gets alone; else rows are computed one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial

from torch import Tensor, nn

from deployments.engine.lora_rows import current_lora_rows
from deployments.lora_format.layer_names import LayerKey
from deployments.loras.graph_layers import GraphLayers
from deployments.loras.joint_linear import LoraLayer
from deployments.loras.lora_forward import LoraForward, LoraModel
from deployments.loras.lora_set import LoraSet
from deployments.loras.low_rank_products import BatchInvariance
from deployments.protocol.errors import ModelFailed


class BatchedLora:
    """The replaced forwards of one model's layers. `hook` and `unhook` run on the engine's thread, as
    forwards do."""

    def __init__(self, parts: Mapping[str, nn.Module], *, deterministic: bool) -> None:
        """parts: the pipeline's modules by name. deterministic: a row's bits do not depend on other rows."""
        self.parts = parts
        self._model = LoraModel(BatchInvariance() if deterministic else None)
        self._replaced: dict[nn.Module, Callable[[Tensor], Tensor] | None] = {}  # own forwards before
        self._graph_layers = GraphLayers()

    def make_graph_layers(self, blocks: Iterable[nn.Module]) -> None:
        """Let code that is compiled for these blocks not depend on LoRAs, before it is compiled.

        Raises ModelFailed for a block with convolutions, which LoRAs may change too.
        """
        for block in blocks:
            layers = list(block.modules())
            if any(isinstance(layer, nn.Conv2d) for layer in layers):
                raise ModelFailed(
                    f"{type(block).__name__} has convolutions and cannot be compiled with LoRAs; "
                    "set lora: none in the card, or take compile out"
                )
            self._graph_layers.add(layer for layer in layers if isinstance(layer, nn.Linear))

    def hook(self, layers: Iterable[LayerKey]) -> None:
        """Have these layers add low-rank products; others have no cost."""
        for key in layers:
            if key in self._model.layers:
                continue
            part, path = key
            layer = self.parts[part].get_submodule(path)
            self._model.shared.forget(part)
            if layer in self._graph_layers:
                hooked = self._model.layers[key] = LoraLayer(key, layer, *self._graph_layers.plain(layer))
                self._graph_layers.set_forward(layer, partial(self._forward, hooked))
                continue
            plain = layer.forward, "forward" in vars(layer)
            hooked = self._model.layers[key] = LoraLayer(key, layer, *plain)
            self._replace(layer, partial(self._forward, hooked))
            parent = self.parts[part].get_submodule(path.rpartition(".")[0])
            for child in parent.children():
                if type(child) is nn.SiLU and not child.inplace and child not in self._replaced:
                    self._replace(child, partial(self._activation, child.forward))

    def has_hooks(self, layers: Iterable[LayerKey]) -> bool:
        """Whether all these layers have replaced forwards."""
        return all(key in self._model.layers for key in layers)

    def unhook(self) -> None:
        """Restore all forwards and free all slots."""
        for module, before in self._replaced.items():
            if before is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = before
        self._replaced.clear()
        self._graph_layers.clear()
        for part in {part for part, _ in self._model.layers}:
            self._model.shared.forget(part)
        self._model.layers.clear()
        self._model.slots.clear()

    def forget(self, lora_set: LoraSet) -> None:
        """Free the slots of this LoRA set. May be called from any thread."""
        self._model.slots.forget(lora_set)

    @property
    def stacked_bytes(self) -> int:
        """Device memory of the slots of the last batches. May be called from any thread."""
        return self._model.slots.size_bytes

    def _replace(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        self._replaced[module] = vars(module).get("forward")
        vars(module)["forward"] = forward

    def _forward(self, layer: LoraLayer, x: Tensor) -> Tensor:
        forward = self._current()
        return layer.plain(x) if forward is None else forward.layer(layer, x)

    def _activation(self, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        forward = self._current() if x.ndim == 2 else None
        return plain(x) if forward is None else forward.activation(plain, x)

    def _is_own(self, lora_set: Hashable | None) -> bool:
        """A request of another model may use this one as its refiner, with LoRAs of that model."""
        return not isinstance(lora_set, LoraSet) or lora_set.owner in (None, self)

    def _current(self) -> LoraForward | None:
        """The forward that runs; None if no row has LoRAs."""
        rows = current_lora_rows()
        if rows is None:
            return None
        if rows.cache is None:
            own = [lora_set if self._is_own(lora_set) else None for lora_set in rows.lora_sets]
            rows.cache = LoraForward(self._model, own)
        forward: LoraForward = rows.cache
        return forward
