"""Whether an adapter fits a model's layers: asked before a job is accepted, as far as that is known then."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping

from deployments.lora_format.header import HEAD_BYTES, tensor_shapes
from deployments.lora_format.shape_check import Shape, find_mismatch
from deployments.protocol.card import ModelCard, Weights
from deployments.protocol.errors import BadRequest
from serve_app.storage.results import ResultStore, adapter_path

VERDICTS_KEPT = 10_000
ASK_AGAIN_S = 30.0  # after a model did not tell its layers: it is not loaded, or too busy

Layers = Mapping[str, Shape]
LayerLookup = Callable[[str], Awaitable[Layers | None]]  # of a model; None: nobody can tell now

_Model = tuple[str, Weights]  # a card may be changed; its layers are those of its weights


class CompatibilityCheck:
    """Compares shapes; remembers layers and verdicts. A model that is not loaded is asked nothing, and its
    replica refuses what does not fit when it is."""

    def __init__(self, results: ResultStore, layer_lookup: LayerLookup) -> None:
        self._results = results
        self._layer_lookup = layer_lookup
        self._layers: dict[_Model, Layers] = {}
        self._ask_at: dict[_Model, float] = {}  # time.monotonic()
        self._verdicts: OrderedDict[tuple[str, _Model], str | None] = OrderedDict()

    async def check(self, name: str, digest: str, card: ModelCard, param: str) -> None:
        """Raises BadRequest with the first factor of the stored file that does not fit, and both shapes."""
        model = card.id, card.weights
        if (digest, model) not in self._verdicts:
            layers = await self._layers_of(model)
            if not layers:
                return
            head = await self._results.read_range(adapter_path(digest), 0, HEAD_BYTES - 1)
            verdict = await asyncio.to_thread(lambda: find_mismatch(tensor_shapes(head), layers))
            self._verdicts[digest, model] = verdict
            if len(self._verdicts) > VERDICTS_KEPT:
                self._verdicts.popitem(last=False)
        reason = self._verdicts.get((digest, model))
        if reason is not None:
            raise BadRequest(
                f"{name} does not fit {card.id}: {reason}; use one that was trained for this model",
                param=param,
            )

    async def _layers_of(self, model: _Model) -> Layers | None:
        if model not in self._layers and time.monotonic() >= self._ask_at.get(model, 0.0):
            told = await self._layer_lookup(model[0])
            if told:
                self._layers[model] = told
            else:
                self._ask_at[model] = time.monotonic() + ASK_AGAIN_S
        return self._layers.get(model)
