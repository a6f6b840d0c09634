"""GPUs as their drivers report them, for plans of machines that are not at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from deployments.planning.device_limit import GIB, usable_bytes
from deployments.planning.machine import DeviceKind, Machine
from deployments.protocol.card import ModelCard

MPS_SHARES = ((36, 0.75), (0, 2 / 3))  # of unified memory that Metal gives to the GPU, from so many GiB on


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of device. total_gib: as torch's `total_memory`; it is less than what is sold."""

    name: str  # as `weft plan --gpu` takes it
    full_name: str
    total_gib: float | None  # None: no limit
    kind: DeviceKind = "cuda"
    capability: tuple[int, int] | None = None
    architecture: str = ""

    def machine(self, gpu_share: float = 1.0) -> Machine:
        """A machine with one of these, of which a process has a part: gpu_share, as `num_gpus`."""
        limit = None
        if self.total_gib is not None:
            total = int(self.total_gib * GIB)
            limit = total if self.kind == "mps" else usable_bytes(total, total, gpu_share)
        return Machine(self.full_name, self.kind, limit, self.capability, architecture=self.architecture)


def _mps(gib: int) -> Gpu:
    share = next(share for least, share in MPS_SHARES if gib >= least)
    return Gpu(f"mps-{gib}", f"Apple GPU, {gib} GB", gib * share, "mps")


def machine_of_replica(card: ModelCard, name: str) -> Machine:
    """What a replica of this card has of the device that GPUS has under this name."""
    return limited(GPUS[name].machine(card.serving.num_gpus), card)


def limited(machine: Machine, card: ModelCard) -> Machine:
    """With no more memory than the card allows."""
    if card.serving.memory_gib is None:
        return machine
    most = int(card.serving.memory_gib * GIB)
    limit = most if machine.limit_bytes is None else min(most, machine.limit_bytes)
    return replace(machine, limit_bytes=limit)


_ALL = (
    Gpu("rtx-3060", "NVIDIA GeForce RTX 3060", 11.76, capability=(8, 6)),
    Gpu("t4", "Tesla T4", 14.74, capability=(7, 5)),
    Gpu("a10g", "NVIDIA A10G", 22.06, capability=(8, 6)),
    Gpu("l4", "NVIDIA L4", 22.03, capability=(8, 9)),
    Gpu("rtx-4090", "NVIDIA GeForce RTX 4090", 23.65, capability=(8, 9)),
    Gpu("l40s", "NVIDIA L40S", 44.39, capability=(8, 9)),
    Gpu("a100-40", "NVIDIA A100-SXM4-40GB", 39.39, capability=(8, 0)),
    Gpu("a100-80", "NVIDIA A100-SXM4-80GB", 79.14, capability=(8, 0)),
    Gpu("h100", "NVIDIA H100 80GB HBM3", 79.10, capability=(9, 0)),
    Gpu("h200", "NVIDIA H200", 139.72, capability=(9, 0)),
    Gpu("b200", "NVIDIA B200", 178.35, capability=(10, 0)),
    Gpu("mi300x", "AMD Instinct MI300X", 191.69, "rocm", architecture="gfx942"),
    _mps(16),
    _mps(64),
    Gpu("cpu", "CPU", None, "cpu"),
)
GPUS: Mapping[str, Gpu] = {gpu.name: gpu for gpu in _ALL}  # by name
# names in GPUS by those of ray.util.accelerators, which a card's accelerator_type is one of
ACCELERATORS: Mapping[str, str] = {
    **{name: name.lower() for name in ("T4", "A10G", "L4", "L40S", "H100", "H200", "B200")},
    "A100": "a100-40",  # of either size: the smaller one
    "A100-40G": "a100-40",
    "A100-80G": "a100-80",
    "AMD-Instinct-MI300X-OAM": "mi300x",
    "AMD-Instinct-MI300X-HF": "mi300x",
}
