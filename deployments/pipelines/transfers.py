"""Copies between host and device for which the engine's thread does not wait."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, which a GPU makes when its current stream gets there."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, copy=True)


class HostCopy:
    """A copy of a tensor on the host. The tensor may be freed or written to as soon as this is made."""

    def __init__(self, tensor: Tensor) -> None:
        """Call it on the thread and the stream on which the tensor is computed."""
        self._copied: Any = None
        if not tensor.is_cuda:
            self._tensor = tensor.clone()
            return
        self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._tensor.copy_(tensor, non_blocking=True)
        self._copied = torch.cuda.Event(blocking=True)  # the thread that waits sleeps
        self._copied.record()

    def wait(self) -> Tensor:
        """The copy, once it has been made. Blocks; call it in another thread."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor
