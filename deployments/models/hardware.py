"""The device that this process may use."""

from __future__ import annotations

import torch


def best_device() -> torch.device:
    """CUDA (or ROCm, which torch calls cuda too), else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def memory_bytes(device: torch.device) -> int | None:
    """Bytes of a GPU that weights may take: nine tenths, the rest is for activations. None elsewhere."""
    if device.type != "cuda":
        return None
    return int(0.9 * torch.cuda.get_device_properties(device).total_memory)
