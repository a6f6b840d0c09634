"""What a device is and has, as far as a plan depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DeviceKind = Literal["cuda", "rocm", "mps", "cpu"]


@dataclass(frozen=True, slots=True)
class Machine:
    """One device and the host that it is in."""

    name: str  # such as "NVIDIA A10G"
    kind: DeviceKind
    limit_bytes: int | None = None  # that this process may allocate on the device; None: no limit
    capability: tuple[int, int] | None = None  # of an NVIDIA GPU, such as (8, 6)
    host_bytes: int | None = None  # memory of the host for offloaded parts; None: not known
