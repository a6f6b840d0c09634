"""One model's part of the account of the device's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from deployments.engine.plain_tensors import stored_bytes
from deployments.loras.device_slots import DeviceSlot
from deployments.models.device_memory import GIB
from deployments.models.memory_admission import MemoryAdmission
from deployments.models.model_cache import PIPELINE
from deployments.models.offload import offloaded_part
from deployments.protocol.card import ModelCard, Weights

Loaded = TypeVar("Loaded")
Admit = Callable[[int], None]  # called with the bytes of weights on the device, before they are there


def weights_bytes(modules: Iterable[nn.Module]) -> int:
    """Size of all parameters and buffers; those that modules share count once."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum({id(tensor): stored_bytes(tensor) for tensor in tensors}.values())


def held_bytes(modules: Sequence[nn.Module]) -> int:
    """Of their weights, what is on the device all the time."""
    offloaded = [part for module in modules if (part := offloaded_part(module)) is not None]
    whole = weights_bytes([module for module in modules if offloaded_part(module) is None])
    return whole + sum(part.held_bytes for part in offloaded)


@dataclass(slots=True)
class ModelMemory:
    """Admits the weights of one model, whenever they are loaded. Any thread but the event loop's."""

    admission: MemoryAdmission
    card: ModelCard
    working_bytes: int | None = None  # for one picture, as planned; None: what the card states
    _loaded_last: str = ""

    @property
    def size_bytes(self) -> int:
        """Of all weights of the model on the device."""
        return self.admission.memory.weights_of(self.card.id)

    def admit_pipeline(self, size_bytes: int) -> None:
        """Claim the model's own weights and the space for one picture; called before they are on the device.

        Raises OutOfMemory where they do not fit.
        """
        memory = self.admission.memory
        space = self._space(size_bytes)
        if memory.limit_bytes is not None:  # with less space than the card states a smaller picture may fit
            space = min(space, memory.limit_bytes - size_bytes)
        memory.expect_working(self.card.id, max(0, space))
        self._claim(PIPELINE, size_bytes, f"the model {self.card.id}")

    def expect_uses(self, modules: Sequence[nn.Module], saved_bytes: int) -> None:
        """Keep space for one picture, and for what is copied to the device while these modules are used.

        The card states the bytes of all weights in its dtype with those of a picture; not all of them are on
        the device, and quantised ones are smaller, by `saved_bytes` in all.
        """
        offloaded = [part for module in modules if (part := offloaded_part(module)) is not None]
        if not offloaded and not saved_bytes:
            return
        memory, held = self.admission.memory, held_bytes(modules)
        elsewhere = sum(part.host_bytes for part in offloaded)
        space = self._space(held + elsewhere + saved_bytes)
        if memory.limit_bytes is not None:
            space = min(space, memory.limit_bytes - held)
        memory.expect_working(self.card.id, max(0, space, *(part.used_bytes for part in offloaded)))

    def load(self, weights: Weights, what: str, load: Callable[[Admit], Loaded]) -> Loaded:
        """What `load` returns; its argument admits bytes before they are on the device.

        Raises what `load` raises, OutOfMemory and Overloaded.
        """
        self._loaded_last = weights.path or str(weights.repo)
        try:
            return load(self.admit(weights, what))
        except BaseException:
            self.keep([])
            raise

    def admit(self, weights: Weights, what: str) -> Admit:
        """A function that claims memory for these weights."""
        name = weights.path or str(weights.repo)
        return lambda size_bytes: self._claim(name, size_bytes, f"{what} {name}")

    def keep(self, modules: Sequence[nn.Module]) -> None:
        """Of what `load` loaded last, only these modules stay on the device."""
        self.admission.memory.record("weights", (self.card.id, self._loaded_last), held_bytes(modules))
        self.admission.notify_from_thread()

    def close(self) -> None:
        """Release all weights. LoRAs are released with their slots."""
        self.admission.memory.release_weights(self.card.id)
        self.admission.memory.expect_working(self.card.id, 0)

    def _space(self, weights_bytes: int) -> int:
        """For one picture: as planned, or what the card states beyond all weights."""
        if self.working_bytes is not None:
            return self.working_bytes
        return int(self.card.vram_gib * GIB) - weights_bytes

    def _claim(self, name: str, size_bytes: int, what: str) -> None:
        self.admission.admit_from_thread("weights", (self.card.id, name), size_bytes, what)


@dataclass(frozen=True, slots=True)
class LoraMemory:
    """The SlotMemory of one model's LoRAs, on the event loop."""

    admission: MemoryAdmission
    model: str

    async def admit(self, slot: DeviceSlot, size_bytes: int, lora_id: str) -> None:
        await self.admission.admit("loras", (self.model, slot), size_bytes, f"the LoRA {lora_id[:12]}")

    def release(self, slot: DeviceSlot) -> None:
        self.admission.memory.release("loras", (self.model, slot))

    def notify(self) -> None:
        self.admission.notify()
