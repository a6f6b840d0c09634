"""What a device is and has, as far as a plan depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DeviceKind = Literal["cuda", "rocm", "mps", "cpu"]

# AMD's architectures with matrix units for 8-bit floats: MI300, MI350, RX 9000
_ROCM_FP8 = ("gfx94", "gfx95", "gfx12")


@dataclass(frozen=True, slots=True)
class Machine:
    """One device and the host that it is in."""

    name: str  # such as "NVIDIA A10G"
    kind: DeviceKind
    limit_bytes: int | None = None  # that this process may allocate on the device; None: no limit
    capability: tuple[int, int] | None = None  # of an NVIDIA GPU, such as (8, 6)
    host_bytes: int | None = None  # memory of the host for offloaded parts; None: not known
    architecture: str = ""  # of an AMD GPU, such as "gfx942"

    @property
    def computes_bfloat16(self) -> bool:
        """NVIDIA's GPUs before Ampere compute in float16 only."""
        return self.capability is None or self.capability >= (8, 0)

    @property
    def has_fp8(self) -> bool:
        """Whether its matrix units multiply 8-bit floats: NVIDIA's since Ada, AMD's since MI300."""
        if self.kind == "cuda":
            return self.capability is not None and self.capability >= (8, 9)
        return self.kind == "rocm" and self.architecture.startswith(_ROCM_FP8)

    @property
    def is_gpu(self) -> bool:
        """Whether it has memory of its own, from and to which weights can be copied."""
        return self.kind in ("cuda", "rocm")
