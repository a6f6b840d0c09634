"""Parts of a pipeline whose weights are in memory of the host, and on the device while they compute, if at
all: text encoders may compute on the CPU.

diffusers' own group offloading has the host wait for the device at every block, leaves a block on the device
where a forward fails, and keeps no block there for good. Here nothing waits: copies run on a stream of their
own into two blocks of memory that are reserved for them, so that a forward cannot run out of memory midway.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from deployments.engine.intercept import STATELESS_VAES
from deployments.engine.plain_tensors import stored_bytes
from deployments.models.packed_weights import PackedWeights, weights_of
from deployments.planning.plan import TEXT_ENCODERS, PartPlan

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)  # whose weights only their own call uses
SMALL_BYTES = 64 * 2**10  # a layer below this is not worth a copy


class OffloadedPart(Protocol):
    """A part whose weights are not all on the device."""

    held_bytes: int  # on the device all the time
    used_bytes: int  # on it during a use, beyond those
    host_bytes: int  # in memory of the host

    def close(self) -> None:
        """Free its memory on the device. The part must not be used any more."""


_offloaded: weakref.WeakKeyDictionary[nn.Module, OffloadedPart] = weakref.WeakKeyDictionary()


def offloaded_part(module: nn.Module) -> OffloadedPart | None:
    """How this component is offloaded; None: all of it is on the device."""
    return _offloaded.get(module)


def share_place(module: nn.Module, other: nn.Module) -> None:
    """Have `other`, which has the weights of `module`, be offloaded as this is."""
    if (part := _offloaded.get(module)) is not None:
        _offloaded[other] = part


def offload(module: nn.Module, plan: PartPlan, device: torch.device) -> None:
    """Place a component, which is on the host, as planned; it computes on `device` all the same.

    Raises ValueError for a placement that it has not.
    """
    match plan.placement:
        case "cpu" if plan.name in TEXT_ENCODERS:
            _offloaded[module] = OnCpu(module, device)
        case "on_demand" if type(module).__name__ in STATELESS_VAES:
            _offloaded[module] = HalvesOnDemand(module, device)
        case "on_demand":
            _offloaded[module] = OnDemand(module, device)
        case "streamed":
            _offloaded[module] = _Streamed(module, blocks_of(module)[plan.resident_blocks :], device)
        case "sequential":
            _offloaded[module] = _Streamed(module, layers_of(module), device)
        case _:
            raise ValueError(f"{plan.name} cannot be placed as {plan.placement!r}")
    # pipelines bring inputs to the device that this names, as accelerate's hooks do, else to that of a weight
    vars(module)["_hf_hook"] = _ExecutionDevice(device)


@dataclass(frozen=True, slots=True)
class _ExecutionDevice:
    execution_device: torch.device


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists in it, such as a transformer's blocks."""
    blocks: list[nn.Module] = []
    for child in module.children():
        blocks += child if isinstance(child, nn.ModuleList) else blocks_of(child)
    return [block for block in blocks if _bytes_of(block)]


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Its layers with many weights but the first, whose device diffusers takes for that of the module."""
    layers = [layer for layer in module.modules() if isinstance(layer, LAYERS)]
    own = [layer for layer in layers if type(layer) is not nn.modules.linear.NonDynamicallyQuantizableLinear]
    return [layer for layer in own[1:] if _bytes_of(layer) >= SMALL_BYTES]


class OnCpu:
    """All weights stay in memory of the host, and calls compute there: only their inputs and outputs move.

    On the auxiliary lane, so that the device goes on with the steps of other requests meanwhile.
    """

    auxiliary = True

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self.held_bytes = self.used_bytes = 0
        self.host_bytes = _bytes_of(module)

    def call(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """What the function returns for inputs that are copied to the host, on the device."""
        args, kwargs = tree_map_only(Tensor, Tensor.cpu, (args, kwargs))
        return tree_map_only(Tensor, lambda output: output.to(self._device), function(*args, **kwargs))

    def release(self) -> None:
        """Nothing of it is on the device."""

    def close(self) -> None:
        """Nothing of it is on the device."""


class OnDemand:
    """All weights are copied to the device for a use, from `bring` to `release`."""

    auxiliary = False

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._packed = PackedWeights(module, pin=device.type == "cuda")
        self._device = device
        self._block: Tensor | None = None
        self.held_bytes = 0
        self.used_bytes = self.host_bytes = self._packed.size_bytes
        # of modules in it, which some pipelines call by themselves
        parts = [part for part in module.modules() if part is not module]
        self._hooks = _before_each(parts, self._bring_for)

    def bring(self) -> None:
        """Have the weights on the device, on the current stream. After a failure they are on the host."""
        if self._block is None:
            block = torch.empty(self.used_bytes, dtype=torch.uint8, device=self._device)
            self._packed.copy_to(block)
            self._packed.use(self._packed.weights_in(block))
            self._block = block

    def call(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """What the function returns with the weights on the device."""
        self.bring()
        return function(*args, **kwargs)

    def _bring_for(self, _part: nn.Module) -> None:
        self.bring()

    def release(self) -> None:
        """The memory is used again by what its stream does next."""
        self._packed.use_host()
        self._block = None

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.release()


class HalvesOnDemand:
    """The encoder and the decoder of a VAE are copied to the device, each for its own calls; what little a
    VAE computes around them on other threads stays there."""

    def __init__(self, vae: nn.Module, device: torch.device) -> None:
        halves = [vae.get_submodule(name) for name in ("encoder", "decoder")]
        self._halves = [OnDemand(half, device) for half in halves]
        _offloaded.update(zip(halves, self._halves, strict=True))
        packed = {id(weight) for half in halves for weight, _ in weights_of(half)}
        _move_others(vae, packed, device)
        held = [weight for weight, _ in weights_of(vae) if id(weight) not in packed]
        self.held_bytes = sum(map(stored_bytes, held))
        self.used_bytes = max(half.used_bytes for half in self._halves)
        self.host_bytes = sum(half.host_bytes for half in self._halves)

    def close(self) -> None:
        for half in self._halves:
            half.close()


@dataclass(slots=True, eq=False)
class _Place:
    """A block of the device's memory that units pass through."""

    memory: Tensor
    unit: nn.Module | None = None  # whose weights are there or are being copied
    copied: Any = None  # the event after that copy
    weights: dict[nn.Module, list[Tensor]] = field(default_factory=dict)  # views of the memory


class _Streamed:
    """Units (blocks or layers) whose weights are copied to the device while others compute.

    Two places suffice: one unit computes, the next one is copied. Which one is next is learnt. A copy waits
    on its stream for what was queued before the unit that computes now, and so for all that read its place.
    """

    def __init__(self, module: nn.Module, units: Sequence[nn.Module], device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._packed = {unit: PackedWeights(unit, pin=is_cuda) for unit in units}
        self._stream: Any = torch.cuda.Stream(device) if is_cuda else None
        self._device = device
        packed = {id(t) for unit in units for t in (*unit.parameters(), *unit.buffers())}
        _move_others(module, packed, device)
        largest = max((one.size_bytes for one in self._packed.values()), default=0)
        self._places = [
            _Place(torch.empty(largest, dtype=torch.uint8, device=device)) for _ in range(2 if largest else 0)
        ]
        held = [weight for weight, _ in weights_of(module) if id(weight) not in packed]
        self.held_bytes = sum(map(stored_bytes, held)) + len(self._places) * largest
        self.used_bytes = 0
        self.host_bytes = sum(packed.size_bytes for packed in self._packed.values())
        self._following: dict[nn.Module, nn.Module] = {}
        self._current: nn.Module | None = None
        self._hooks = _before_each(units, self._bring)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._stream is not None:
            self._stream.synchronize()
        for packed in self._packed.values():
            packed.use_host()
        self._places.clear()

    def _bring(self, unit: nn.Module) -> None:
        """Have the unit compute on the device, and begin to copy the one that follows."""
        before = self._current
        if before is unit:
            return
        if before is not None:
            self._following[before] = unit
            self._packed[before].use_host()
            self._current = None
        place = self._place_of(unit) or self._fetch(unit, keep=None)
        self._wait_for(place)
        self._packed[unit].use(place.weights[unit])
        self._current = unit
        following = self._following.get(unit)
        if following is not None and self._place_of(following) is None:
            self._fetch(following, keep=place)

    def _place_of(self, unit: nn.Module) -> _Place | None:
        return next((place for place in self._places if place.unit is unit), None)

    def _fetch(self, unit: nn.Module, keep: _Place | None) -> _Place:
        """Queue the copy of a unit to the place that is not to be kept."""
        place = next(place for place in self._places if place is not keep)
        place.unit = None
        packed = self._packed[unit]
        if self._stream is None:
            packed.copy_to(place.memory)
        else:
            ready = torch.cuda.current_stream(self._device).record_event()
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                packed.copy_to(place.memory)
                place.copied = self._stream.record_event()
        if unit not in place.weights:
            place.weights[unit] = packed.weights_in(place.memory)
        place.unit = unit
        return place

    def _wait_for(self, place: _Place) -> None:
        if place.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(place.copied)


def _before_each(parts: Iterable[nn.Module], act: Callable[[nn.Module], None]) -> list[RemovableHandle]:
    """Have the method `act` called before each call of these modules, which do not keep its object alive: a
    part that is dropped while it is loaded frees its memory at once."""
    method = weakref.WeakMethod(act)

    def before(module: nn.Module, _inputs: Any) -> None:
        if (found := method()) is not None:
            found(module)

    return [part.register_forward_pre_hook(before) for part in parts]


def _move_others(module: nn.Module, kept: set[int], device: torch.device) -> None:
    """Move to the device what is not `kept` (ids of tensors)."""
    for weight, places in weights_of(module):
        if id(weight) in kept or weight.device.type == device.type:
            continue
        moved = weight.to(device)
        if isinstance(weight, nn.Parameter) and not isinstance(moved, nn.Parameter):
            moved = nn.Parameter(moved, requires_grad=False)
        for container, name in places:
            container[name] = moved


def _bytes_of(module: nn.Module) -> int:
    return sum(stored_bytes(weight) for weight, _ in weights_of(module))
