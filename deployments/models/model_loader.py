"""Loading the models of a replica's cards."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from deployments.loras.file_reader import LoraFileReader
from deployments.models.hardware import best_device, limit_to_share, memory_bytes
from deployments.models.model_cache import ModelCache
from deployments.models.model_instance import ModelInstance
from deployments.protocol.card import ModelCard

GIB = 2**30


class ModelLoader:
    """Loads models onto the best device of this process."""

    def __init__(
        self,
        cards: Sequence[ModelCard],
        refiners: Mapping[str, ModelCard],
        lora_files: LoraFileReader,
        *,
        gpu_share: float,
    ) -> None:
        """refiners: by card id, the card that card.refiner names. lora_files: for all models.

        gpu_share: the part of a GPU that belongs to this process, as `num_gpus`.
        """
        self.device = best_device()
        self._gpu_share = gpu_share
        limit_to_share(self.device, gpu_share)
        self.loads: dict[str, tuple[int, float]] = {}  # by model: number of loads, and their seconds
        self._cards = {card.id: card for card in cards}
        self._refiners = refiners
        self._lora_files = lora_files

    def open_cache(self, limit: int) -> ModelCache[ModelInstance]:
        """A cache of at most `limit` models; the model of the first card is loaded at once.

        Raises ModelUnavailable when its weights cannot be loaded.
        """
        cache = ModelCache(
            self._load,
            ModelInstance.unload,
            lambda model: model.size_bytes,
            limit=limit,
            max_bytes=memory_bytes(self.device, self._gpu_share),
            expected_bytes=lambda name: int(self._cards[name].vram_gib * GIB),
        )
        first = next(iter(self._cards))
        cache.put(first, self._load(first, while_serving=False))
        return cache

    def _load(self, name: str, *, while_serving: bool = True) -> ModelInstance:
        started = time.monotonic()
        model = ModelInstance(
            self._cards[name],
            self._refiners.get(name),
            self.device,
            while_serving=while_serving,
            lora_files=self._lora_files,
        )
        times, seconds = self.loads.get(name, (0, 0.0))
        self.loads[name] = (times + 1, seconds + time.monotonic() - started)
        return model
