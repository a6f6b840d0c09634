"""Loading the models of a replica's cards."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar
from weakref import ReferenceType

from torch import nn

from deployments.engine.device_errors import DeviceBroken, is_device_broken
from deployments.engine.out_of_memory import is_out_of_memory, shortage
from deployments.loras.file_reader import LoraFileReader
from deployments.models.device_memory import GIB, DeviceMemory, Needed
from deployments.models.devices import device_called
from deployments.models.extras import Extras
from deployments.models.hardware import (
    free_unused_memory,
    limit_to_share,
    machine_of,
    memory_bytes,
    references_to,
    wait_for_kernels,
)
from deployments.models.load import folder_of, pipeline_bytes
from deployments.models.load_errors import explain
from deployments.models.load_failures import LoadFailures, operator_state
from deployments.models.memory_admission import MemoryAdmission
from deployments.models.model_cache import ModelCache
from deployments.models.model_instance import ModelInstance
from deployments.models.model_memory import ModelMemory
from deployments.models.weight_cache import fetch
from deployments.planning.file_needs import with_needs
from deployments.planning.machine import Machine
from deployments.planning.plan import Plan, plan_of
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import ModelFailed, ModelUnavailable, OutOfMemory, Overloaded, WeftError

RETRY_PAUSES_S = (1.0, 3.0)  # before the network is tried again
MAX_CHARS = 1_000  # of a message

T = TypeVar("T")

logger = logging.getLogger(__name__)


class ModelLoader:
    """Loads models onto the device of this process."""

    def __init__(
        self,
        cards: Sequence[ModelCard],
        refiners: Mapping[str, ModelCard],
        lora_files: LoraFileReader,
        *,
        gpu_share: float,
        device: str | None = None,
        reserves_gpu: bool = False,
    ) -> None:
        """refiners: by card id, the card that card.refiner names. lora_files: for all models.

        gpu_share: the part of a GPU that belongs to this process, as `num_gpus`.
        device: as torch names it; None: the best that there is. reserves_gpu: as for device_called.
        Raises ModelUnavailable when it is not there.
        """
        self.device = device_called(device, reserves_gpu=reserves_gpu)
        self._gpu_share = gpu_share
        self._memory_gib = cards[0].serving.memory_gib
        self._models_loaded = cards[0].serving.models_loaded
        limit_to_share(self.device, gpu_share)
        self.memory = DeviceMemory(self._limit_bytes)
        self.admission = MemoryAdmission(self.memory)
        self.extras = Extras(self.admission)
        self._left: dict[str, Collection[ReferenceType[nn.Module]]] = {}  # of unloaded models
        self.loads: dict[str, tuple[int, float]] = {}  # by model: number of loads, and their seconds
        self.failures = LoadFailures(lambda name: operator_state(self._cards[name].weights))
        self._cards = {card.id: with_needs(card) for card in cards}
        self._refiners = refiners
        self._lora_files = lora_files

    def shared_refiner(self, name: str) -> str | None:
        """The model of the replica that refines this one's pictures: it is loaded once for both uses. None
        where there is none with these weights, and where the replica may hold one model at a time."""
        refiner = self._refiners.get(name)
        model = None if refiner is None else self._cards.get(refiner.id)
        if refiner is None or model is None or model.id == name or self._models_loaded < 2:
            return None
        return model.id if model.weights == refiner.weights else None

    @property
    def names(self) -> list[str]:
        """Ids of the models that may be loaded."""
        return list(self._cards)

    @property
    def machine(self) -> Machine:
        """The device, with what this process may allocate on it now."""
        return machine_of(self.device, self._limit_bytes())

    def open_cache(self) -> ModelCache[ModelInstance]:
        """A cache of at most `models_loaded` models; the model of the first card is loaded at once.

        When it cannot be loaded, the replica serves the others, and `failures` says why: a replica that ended
        here would be started again and again, and no one would learn the reason.
        """
        cache = ModelCache(
            self._load,
            self._unload,
            lambda model: model.size_bytes,
            limit=self._models_loaded,
            admission=self.admission,
            needed=self._needed,
            prepare=self._prepare,
            free=lambda name: free_unused_memory(self._left.pop(name, ())),
        )
        first = next(iter(self._cards))
        with suppress(WeftError):  # it is recorded
            self._prepare(first)
            cache.put(first, self._load(first))
        return cache

    def _unload(self, model: ModelInstance) -> None:
        self._left[model.card.id] = references_to(model.pipelines.modules)
        wait_for_kernels(self.device)
        model.unload()

    def _prepare(self, name: str) -> None:
        """Fetch the weights to this node, before others have to make way for them on the device.

        Raises at once what the last try raised, until it is time for another one: see LoadFailures. What the
        plan refuses is not fetched.
        """
        self.failures.check(name)
        self._recorded(name, lambda: self._check_plan(name))
        self._recorded(name, lambda: self._with_retry(name, lambda: self._fetch(self._cards[name])))

    def _load(self, name: str) -> ModelInstance:
        return self._recorded(name, lambda: self._with_retry(name, lambda: self._load_once(name)))

    def _recorded(self, name: str, work: Callable[[], T]) -> T:
        """What the work returns; a failure is recorded, and a bug of a library is one too."""
        try:
            return work()
        except (Overloaded, DeviceBroken):
            raise
        except WeftError as error:
            self.failures.record(name, error)
            raise
        except Exception as error:
            if is_device_broken(error):
                raise
            logger.exception("a model cannot be loaded", extra={"model": name})
            failure = _as_failure(name, error)
            self.failures.record(name, failure)
            raise failure from error

    def _with_retry(self, name: str, work: Callable[[], T]) -> T:
        """What the work returns, tried again while only the network is in the way."""
        for pause_s in RETRY_PAUSES_S:
            try:
                return work()
            except ModelUnavailable as error:
                about = {"model": name, "pause_s": pause_s, "error": error.message}
                logger.warning("weights were not fetched; it is tried again", extra=about)
            time.sleep(pause_s)
        return work()

    def _fetch(self, card: ModelCard) -> None:
        """Have the weights on this node. Raises ModelFailed, ModelUnavailable."""
        if not card.weights.is_remote:
            folder_of(card.weights)
        if not card.weights.needs_fetch:
            return
        try:
            fetch(card.weights, pipeline=True)
        except Exception as error:
            explained = explain(error, card.weights, card.licence)
            if explained is error:
                raise
            raise explained from error

    def _load_once(self, name: str) -> ModelInstance:
        started, shares_refiner = time.monotonic(), self.shared_refiner(name) is not None
        try:
            model = ModelInstance(
                self._cards[name],
                self.machine,
                None if shares_refiner else self._refiners.get(name),
                self.device,
                admission=self.admission,
                extras=self.extras,
                lora_files=self._lora_files,
                beside=self._beside(name),
                is_given_refiner=shares_refiner,
            )
        except BaseException:
            self.memory.release_model(name)
            raise
        times, seconds = self.loads.get(name, (0, 0.0))
        self.loads[name] = (times + 1, seconds + time.monotonic() - started)
        self.failures.clear(name)
        self._log_memory()
        return model

    def _limit_bytes(self) -> int | None:
        """What the device has for this process, at most what the card allows; None: no limit."""
        limits = [memory_bytes(self.device, self._gpu_share)]
        limits.append(None if self._memory_gib is None else int(self._memory_gib * GIB))
        return min((limit for limit in limits if limit is not None), default=None)

    def plan(self, name: str) -> Plan:
        """How this model would run on the device as it is now."""
        return plan_of(self._cards[name], self.machine, self._beside(name))

    def _check_plan(self, name: str) -> None:
        """Raises OutOfMemory or ModelFailed for a model that cannot run on this device."""
        refusal = self.plan(name).refusal
        if refusal is not None:
            raise refusal.error()

    def _beside(self, name: str) -> list[ModelCard]:
        """The cards that may be loaded beside a model: its refiner's, and those of the replica."""
        refiner = self._refiners.get(name)
        others = [card for other, card in self._cards.items() if other != name]
        if refiner is None:
            return others
        return [refiner, *(card for card in others if card.id != refiner.id)]

    def _needed(self, name: str) -> Needed:
        """Of a model whose weights are on this node and not read yet: as its plan has them, by its files."""
        card = self._cards[name]

        def read_headers() -> Needed:
            plan = self.plan(name)
            size = pipeline_bytes(
                card.weights,
                self.device,
                plan=plan,
                compiled=card.serving.compile,
                licence=card.licence,
            )
            return ModelMemory(self.admission, card, plan.working_bytes).needed(size)

        return self._recorded(name, read_headers)

    def _log_memory(self) -> None:
        parts = {f"{part}_bytes": size for part, size in self.memory.held.items()}
        limit = self.memory.limit_bytes
        logger.info("memory of the device", extra={**parts, "limit_bytes": limit or "none"})


def _as_failure(name: str, error: Exception) -> WeftError:
    if is_out_of_memory(error):
        return OutOfMemory(f"the model {name} does not fit into the memory{shortage(error)}")
    return ModelFailed(f"{name} cannot be loaded: {type(error).__name__}: {error}"[:MAX_CHARS])
