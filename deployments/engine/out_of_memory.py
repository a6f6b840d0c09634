"""Recognises that a forward ran out of memory, and frees what can be freed."""

from __future__ import annotations

import torch

from deployments.engine.call import ModuleCall
from deployments.protocol.errors import OutOfMemory


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the host had too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's CPU allocator


def as_out_of_memory(call: ModuleCall, error: Exception) -> OutOfMemory:
    """The error for the request whose call did not fit even alone."""
    wrapped = OutOfMemory(
        f"the device ran out of memory in {call.seam.name} with {call.batch_size} rows; "
        "ask for fewer pictures or a smaller size"
    )
    wrapped.__cause__ = error
    return wrapped


def free_device_memory() -> None:
    """Return cached memory to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
