"""What an operator costs on a GPU: floating-point operations, bytes moved, seconds by the roofline model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from deployments.planning.gpus import GPUS, Gpu

aten = torch.ops.aten

LAUNCH_S = 2e-6  # the shortest time between two kernels
# operators that read only the rows they return
GATHERS = {aten.embedding, aten.index, aten.index_select, aten.gather, aten.arange, aten.full}
# operators that overwrite their first argument without reading it
OVERWRITES = {aten.copy_, aten.fill_, aten.zero_, aten.index_copy_}


@dataclass(frozen=True, slots=True)
class GpuKind:
    """What limits a kernel, and what its driver says of a GPU."""

    gpu: Gpu  # its name, memory and capability: those that plans are made for
    flops_per_s: float  # in 16 bits, as large matrix products reach it
    bytes_per_s: float
    processors: int

    @property
    def memory_bytes(self) -> int:
        """Of the device."""
        assert self.gpu.total_gib is not None
        return int(self.gpu.total_gib * GIB)

    @property
    def capability(self) -> tuple[int, int]:
        """As torch.cuda.get_device_capability says it."""
        assert self.gpu.capability is not None
        return self.gpu.capability


GIB = 2**30
_SPEEDS = {  # floating-point operations and bytes per second, processors
    "rtx-3060": (51e12 * 0.5, 0.36e12, 28),
    "t4": (65e12 * 0.5, 0.32e12, 40),
    "a10g": (70e12 * 0.7, 0.6e12, 80),
    "l4": (121e12 * 0.5, 0.3e12, 58),
    "l40s": (362e12 * 0.5, 0.864e12, 142),
    "a100-80": (312e12 * 0.7, 2.0e12, 108),
    "h100": (800e12 * 0.7, 3.3e12, 132),
}
KINDS = {name: GpuKind(GPUS[name], *speeds) for name, speeds in _SPEEDS.items()}  # by name, as in GPUS


@dataclass(slots=True)
class Cost:
    """Of one kernel or of many. A kernel here is an operator that launches at least one."""

    kernels: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def add(self, other: Cost) -> None:
        self.kernels += other.kernels
        self.flops += other.flops
        self.bytes += other.bytes
        self.seconds += other.seconds


@dataclass(slots=True)
class CostBySource:
    """Costs by the package or file whose code launched them."""

    total: Cost = field(default_factory=Cost)
    by_source: dict[str, Cost] = field(default_factory=dict)

    def add(self, source: str, cost: Cost) -> None:
        self.total.add(cost)
        self.by_source.setdefault(source, Cost()).add(cost)


def kernel_cost(
    kind: GpuKind, function: Any, flops: float, read: Sequence[Tensor], written: Sequence[Tensor]
) -> Cost:
    """The cost of one kernel. function: its operator; None for a copy between host and device."""
    packet = None if function is None else function.overloadpacket
    if packet in GATHERS:
        moved = 2 * _bytes(written)
    elif packet in OVERWRITES:
        moved = _bytes(read[1:]) + _bytes(written)
    else:
        moved = _bytes(read) + _bytes(written)
    seconds = max(flops / kind.flops_per_s, moved / kind.bytes_per_s, LAUNCH_S)
    return Cost(1, flops, moved, seconds)


def flops_of(function: Any, args: Any, kwargs: Any, out: Any) -> float:
    """By torch's own formulas; 0 for operators without one."""
    formula = flop_formula(function)
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=out))


def flop_formula(function: Any) -> Any:
    """torch's formula for the operator or, where it works in place, for the one that does not."""
    packet = function.overloadpacket
    name = function._schema.name.removeprefix("aten::")
    if packet not in flop_registry and name.endswith("_"):
        packet = getattr(aten, name.rstrip("_"), None)
    return flop_registry.get(packet)


def attention_flops(query: Tensor, key: Tensor, value: Tensor) -> float:
    """Both products of scaled dot-product attention, as a fused kernel computes them."""
    batch, heads, rows, width = (1, 1, *query.shape)[-4:]
    return float(2 * batch * heads * rows * key.shape[-2] * (width + value.shape[-1]))


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(int(tensor.numel() * tensor.element_size()) for tensor in tensors)
