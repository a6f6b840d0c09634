"""The CUDA streams of a device that outlive single requests, by whose work is queued on them.

The engine's has a high priority, so that the kernels of a step go before those of a video that is decoded
beside it. Work of other threads on tensors that the engine uses ends with a synchronisation; a tensor that
one stream allocates and another uses is recorded on that one (`Tensor.record_stream`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

HIGH, LOW = -1, 0  # as torch.cuda.Stream counts


def engine_stream(device: torch.device) -> Any:
    """The stream of the engine's thread; None for a device without streams."""
    return _stream(device.index or 0, HIGH) if device.type == "cuda" else None


def decode_stream(device: torch.device) -> Any:
    """The stream of the thread that decodes videos; None for a device without streams.

    One for all videos: the allocator keeps freed memory per stream.
    """
    return _stream(device.index or 0, LOW) if device.type == "cuda" else None


@cache
def _stream(index: int, priority: int) -> Any:
    return torch.cuda.Stream(torch.device("cuda", index), priority=priority)
