"""How much of a GPU's memory one process may allocate."""

from __future__ import annotations

GIB = 2**30
CONTEXT_BYTES = GIB // 2  # of a process on a GPU, outside of torch's allocator: the context and its kernels
RESERVE_FRACTION = 0.05  # of that memory: what torch's allocator cannot use, because it lies in pieces


def usable_bytes(total: int, free: int, gpu_share: float) -> int:
    """Bytes of a GPU that this process may allocate.

    total: of the GPU. free: what no other process has, as the driver says, and what this one has reserved.
    gpu_share: the part of the GPU that is this process's own, as `num_gpus`; 0: not known, all of it.
    """
    own = int(total * own_share(gpu_share)) - CONTEXT_BYTES
    return max(0, int(min(own, free) * (1 - RESERVE_FRACTION)))


def own_share(gpu_share: float) -> float:
    """The part of a GPU's memory that belongs to a process with `num_gpus: gpu_share`."""
    return gpu_share if 0 < gpu_share < 1 else 1.0
