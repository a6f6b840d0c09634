"""Loading the models of a replica's cards."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from deployments.loras.file_reader import LoraFileReader
from deployments.models.device_memory import GIB, DeviceMemory
from deployments.models.hardware import best_device, limit_to_share, memory_bytes
from deployments.models.memory_admission import MemoryAdmission
from deployments.models.model_cache import ModelCache
from deployments.models.model_instance import ModelInstance
from deployments.protocol.card import ModelCard

logger = logging.getLogger(__name__)


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
        self._memory_gib = cards[0].serving.memory_gib
        limit_to_share(self.device, gpu_share)
        self.memory = DeviceMemory(self._limit_bytes)
        self.admission = MemoryAdmission(self.memory)
        self.loads: dict[str, tuple[int, float]] = {}  # by model: number of loads, and their seconds
        self._cards = {card.id: card for card in cards}
        self._refiners = refiners
        self._lora_files = lora_files

    def open_cache(self, limit: int) -> ModelCache[ModelInstance]:
        """A cache of at most `limit` models; the model of the first card is loaded at once.

        Raises ModelUnavailable when its weights cannot be loaded, OutOfMemory when they do not fit.
        """
        cache = ModelCache(
            self._load,
            ModelInstance.unload,
            lambda model: model.size_bytes,
            limit=limit,
            admission=self.admission,
            expected_bytes=self._expected_bytes,
        )
        first = next(iter(self._cards))
        cache.put(first, self._load(first))
        return cache

    def _load(self, name: str) -> ModelInstance:
        started = time.monotonic()
        try:
            model = ModelInstance(
                self._cards[name],
                self._refiners.get(name),
                self.device,
                admission=self.admission,
                lora_files=self._lora_files,
            )
        except BaseException:
            self.memory.release_weights(name)
            self.memory.expect_working(name, 0)
            raise
        times, seconds = self.loads.get(name, (0, 0.0))
        self.loads[name] = (times + 1, seconds + time.monotonic() - started)
        self._log_memory()
        return model

    def _limit_bytes(self) -> int | None:
        """What the device has for this process, at most what the card allows; None: no limit."""
        limits = [memory_bytes(self.device, self._gpu_share)]
        limits.append(None if self._memory_gib is None else int(self._memory_gib * GIB))
        return min((limit for limit in limits if limit is not None), default=None)

    def _expected_bytes(self, name: str) -> int:
        """Of a model before its weights are read, with one picture: what its card states. A statement beyond
        the device is not believed."""
        stated, limit = int(self._cards[name].vram_gib * GIB), self.memory.limit_bytes
        return stated if limit is None else min(stated, limit)

    def _log_memory(self) -> None:
        parts = {f"{part}_bytes": size for part, size in self.memory.held.items()}
        limit = self.memory.limit_bytes
        logger.info("memory of the device", extra={**parts, "limit_bytes": limit or "none"})
