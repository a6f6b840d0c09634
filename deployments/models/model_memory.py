"""One model's part of the account of the device's memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from deployments.engine.plain_tensors import stored_bytes
from deployments.loras.device_slots import DeviceSlot
from deployments.models.device_memory import GIB, PIPELINE, Needed, Thing
from deployments.models.memory_admission import MemoryAdmission
from deployments.models.offload import offloaded_part
from deployments.protocol.card import ModelCard, Weights


@dataclass(frozen=True, slots=True)
class LoadBytes:
    """Bytes of weights that are loaded."""

    held: int  # on the device once they are there
    loading: int = 0  # on it beyond those while they are loaded
    whole: int | None = None  # of a pipeline, before it is read: of all its weights in their dtype


Admit = Callable[[LoadBytes], None]  # called before weights are on the device, and when they are there


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

    @property
    def size_bytes(self) -> int:
        """Of all weights of the model on the device."""
        return self.admission.memory.weights_of(self.card.id)

    def needed(self, size: LoadBytes) -> Needed:
        """What the model needs with weights of this size."""
        if size.whole is None:  # it is loaded, and has its space for a picture
            return Needed(size.held, size.loading)
        picture, limit = self._space(size.whole), self.admission.memory.limit_bytes
        if limit is not None:  # with less space than the card states a smaller picture may fit
            picture = min(picture, limit - size.held)
        return Needed(size.held, size.loading, max(0, picture))

    def admit_pipeline(self, size: LoadBytes) -> None:
        """Claim the model's own weights and the space for one picture; called before they are on the device.

        Raises OutOfMemory where they do not fit.
        """
        thing, what = (self.card.id, PIPELINE), f"the model {self.card.id}"
        self.admission.admit_from_thread("weights", thing, self.needed(size), what)

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

    def beside(self, what: str) -> MemoryBeside:
        """For weights of this kind beside the pipeline's, such as "the ControlNet"."""
        return MemoryBeside(self.admission, self.card.id, what)

    def _space(self, weights_bytes: int) -> int:
        """For one picture: as planned, or what the card states beyond all weights."""
        if self.working_bytes is not None:
            return self.working_bytes
        return int(self.card.vram_gib * GIB) - weights_bytes


@dataclass(frozen=True, slots=True)
class MemoryBeside:
    """Admits what is loaded beside a model's pipeline: ControlNets, the refiner, preprocessors. Any thread
    but the event loop's."""

    admission: MemoryAdmission
    model: str
    what: str  # it is, for messages and to keep the same weights in two roles apart

    def admit(self, weights: Weights, beside: Collection[Thing] = ()) -> Admit:
        """A function that claims memory for these weights. Raises OutOfMemory and Overloaded.

        beside: what the same request holds already.
        """
        what = f"{self.what} {weights.path or weights.repo}"

        def admit(size: LoadBytes) -> None:
            needed = Needed(size.held, size.loading)
            self.admission.admit_from_thread("weights", self.thing(weights), needed, what, beside)

        return admit

    def keep(self, weights: Weights, modules: Sequence[nn.Module]) -> None:
        """Of these weights only those of these modules stay on the device."""
        self.admission.memory.record("weights", self.thing(weights), held_bytes(modules))
        self.admission.notify_from_thread()

    def release(self, weights: Weights) -> None:
        """These weights are not on the device any more, or could not be loaded."""
        self.keep(weights, [])

    def thing(self, weights: Weights) -> Thing:
        """Under which the account has these weights, of this revision, variant and dtype."""
        return self.model, (self.what, weights)


@dataclass(frozen=True, slots=True)
class LoraMemory:
    """The SlotMemory of one model's LoRAs, on the event loop."""

    admission: MemoryAdmission
    model: str

    async def admit(self, slot: DeviceSlot, size_bytes: int, lora_id: str) -> None:
        what = f"the LoRA {lora_id[:12]}"
        await self.admission.admit("loras", (self.model, slot), Needed(size_bytes), what)

    def release(self, slot: DeviceSlot) -> None:
        self.admission.memory.release("loras", (self.model, slot))

    def notify(self) -> None:
        self.admission.notify()

    def progress(self) -> int:
        return self.admission.progress()
