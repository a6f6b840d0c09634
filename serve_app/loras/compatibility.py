"""Whether a LoRA fits the layers of a model, checked before a job is accepted where the layers are known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

from cachetools import FIFOCache

from deployments.lora_format.classify import model_family
from deployments.lora_format.header import MAX_FILE_BYTES, SIZE_BYTES, LoraHeader, header_bytes, parse_header
from deployments.lora_format.layer_names import LayerNames, Shape
from deployments.lora_format.placement import PlacedTensors, place
from deployments.lora_format.tensor_groups import Problem
from deployments.lora_format.values import CHUNK_BYTES, is_zero
from deployments.protocol.card import ModelCard, Weights
from deployments.protocol.errors import BadRequest
from serve_app.storage.results import ResultStore, adapter_path

HEAD_BYTES = 256 * 2**10  # that are read first; most headers are shorter
MAX_VERDICTS = 10_000
RETRY_LOOKUP_S = 30.0  # after a lookup without an answer: the model is not loaded, or too busy

Layers = Mapping[str, Shape]
LayerLookup = Callable[[str], Awaitable[Layers | None]]  # layers by model id; None: not known now

_Model = tuple[str, Weights]  # a card may be changed; the layers are those of its weights


class CompatibilityCheck:
    """Compares names and shapes, and caches layers and verdicts.

    Nothing is refused while the layers of a model are not known; its replica refuses a LoRA that does not fit
    when it loads it.
    """

    def __init__(self, results: ResultStore, layer_lookup: LayerLookup) -> None:
        self._results = results
        self._layer_lookup = layer_lookup
        self._names: dict[_Model, LayerNames] = {}
        self._next_lookup: dict[_Model, float] = {}  # time.monotonic()
        self._verdicts: FIFOCache[tuple[str, _Model], str | None] = FIFOCache(MAX_VERDICTS)

    async def check(self, name: str, digest: str, card: ModelCard, param: str) -> bool:
        """Whether the layers of the model are known, and every tensor of the stored file has a place there.

        Raises BadRequest with the first tensor that has none and is not zero. name, param: of the LoRA and of
        the request's field, for messages.
        """
        model = card.id, card.weights
        if (digest, model) not in self._verdicts:
            names = await self._names_of(model)
            if names is None:
                return False
            self._verdicts[digest, model] = await self._verdict(digest, names, card.family)
        reason = self._verdicts[digest, model]
        if reason is not None:
            raise BadRequest(f"{name} does not fit {card.id}: {reason}", param=param)
        return True

    async def _verdict(self, digest: str, names: LayerNames, family: str | None) -> str | None:
        """Why the file cannot be used; None where it can."""
        path = adapter_path(digest)
        head = await self._results.read_range(path, 0, HEAD_BYTES - 1)
        end = SIZE_BYTES + header_bytes(head, MAX_FILE_BYTES)
        if end > len(head):
            head += await self._results.read_range(path, len(head), end - 1)
        header, placement = await asyncio.to_thread(_placed, head[SIZE_BYTES:end], names)
        for problem in placement.problems:
            if not await self._is_harmless(problem, path, header):
                made_for = model_family(header.tensors, header.metadata)
                hint = "" if made_for in ("unknown", family) else f" (it looks like a LoRA for {made_for})"
                return problem.reason + hint
        return None

    async def _is_harmless(self, problem: Problem, path: str, header: LoraHeader) -> bool:
        """Whether a tensor without a place adds nothing anyway."""
        for key in problem.unless_zero:
            if await self._is_zero(key, path, header):
                return True
        return False

    async def _is_zero(self, key: str, path: str, header: LoraHeader) -> bool:
        entry, data = header.tensors[key], SIZE_BYTES + header.size_bytes
        for start in range(entry.start, entry.end, CHUNK_BYTES):
            end = min(entry.end, start + CHUNK_BYTES)
            chunk = await self._results.read_range(path, data + start, data + end - 1)
            if not await asyncio.to_thread(is_zero, entry.dtype, chunk):
                return False
        return True

    async def _names_of(self, model: _Model) -> LayerNames | None:
        if model not in self._names and time.monotonic() >= self._next_lookup.get(model, 0.0):
            layers = await self._layer_lookup(model[0])
            if layers:
                self._names[model] = await asyncio.to_thread(LayerNames, layers)
            else:
                self._next_lookup[model] = time.monotonic() + RETRY_LOOKUP_S
        return self._names.get(model)


def _placed(header: bytes, names: LayerNames) -> tuple[LoraHeader, PlacedTensors]:
    parsed = parse_header(header, None)
    return parsed, place(parsed, names)
