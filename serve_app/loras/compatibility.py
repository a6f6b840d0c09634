"""Whether a LoRA fits the layers of a model, checked before a job is accepted where the layers are known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

from cachetools import FIFOCache

from deployments.lora_format.header import HEAD_BYTES, tensor_shapes
from deployments.lora_format.shape_check import Shape, find_mismatch
from deployments.protocol.card import ModelCard, Weights
from deployments.protocol.errors import BadRequest
from serve_app.storage.results import ResultStore, adapter_path

MAX_VERDICTS = 10_000
RETRY_LOOKUP_S = 30.0  # after a lookup without an answer: the model is not loaded, or too busy

Layers = Mapping[str, Shape]
LayerLookup = Callable[[str], Awaitable[Layers | None]]  # layers by model id; None: not known now

_Model = tuple[str, Weights]  # a card may be changed; the layers are those of its weights


class CompatibilityCheck:
    """Compares shapes and caches layers and verdicts.

    Nothing is refused while the layers of a model are not known; its replica refuses a LoRA that does not fit
    when it loads it.
    """

    def __init__(self, results: ResultStore, layer_lookup: LayerLookup) -> None:
        self._results = results
        self._layer_lookup = layer_lookup
        self._layers: dict[_Model, Layers] = {}
        self._next_lookup: dict[_Model, float] = {}  # time.monotonic()
        self._verdicts: FIFOCache[tuple[str, _Model], str | None] = FIFOCache(MAX_VERDICTS)

    async def check(self, name: str, digest: str, card: ModelCard, param: str) -> None:
        """Raises BadRequest with the first factor of the stored file that does not fit, and both shapes.

        name, param: of the LoRA and of the request's field, for messages.
        """
        model = card.id, card.weights
        if (digest, model) not in self._verdicts:
            layers = await self._layers_of(model)
            if not layers:
                return
            head = await self._results.read_range(adapter_path(digest), 0, HEAD_BYTES - 1)
            self._verdicts[digest, model] = await asyncio.to_thread(
                lambda: find_mismatch(tensor_shapes(head), layers)
            )
        reason = self._verdicts[digest, model]
        if reason is not None:
            raise BadRequest(
                f"{name} does not fit {card.id}: {reason}; use one that was trained for this model",
                param=param,
            )

    async def _layers_of(self, model: _Model) -> Layers | None:
        if model not in self._layers and time.monotonic() >= self._next_lookup.get(model, 0.0):
            layers = await self._layer_lookup(model[0])
            if layers:
                self._layers[model] = layers
            else:
                self._next_lookup[model] = time.monotonic() + RETRY_LOOKUP_S
        return self._layers.get(model)
