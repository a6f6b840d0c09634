"""The device that this process may use, and what it says of its memory."""

from __future__ import annotations

import logging

import torch

from deployments.models.device_memory import CONTEXT_BYTES, own_share, usable_bytes

logger = logging.getLogger(__name__)


def best_device() -> torch.device:
    """CUDA (or ROCm, which torch calls cuda too), else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def limit_to_share(device: torch.device, gpu_share: float) -> None:
    """Have torch allocate no more of a GPU than this process's part of it, so that a neighbour keeps its own.

    gpu_share: `num_gpus` of the replica. No effect for a whole GPU and for other devices.
    """
    share = own_share(gpu_share)
    if device.type != "cuda" or share == 1:
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(max(0.0, share - CONTEXT_BYTES / total), device)
    logger.info("limited to a part of the GPU", extra={"share": share, "bytes": int(share * total)})


def memory_bytes(device: torch.device, gpu_share: float) -> int | None:
    """Bytes of a GPU that this process may allocate now, next to the other processes on it. None elsewhere.

    gpu_share: `num_gpus` of the replica.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return usable_bytes(total, free + torch.cuda.memory_reserved(device), gpu_share)
