"""An adapter's factors on the device, by one copy from pinned memory for each dtype among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deployments.loras.source import Adapter


def upload(adapter: Adapter, device: torch.device) -> Adapter:
    """The adapter with factors that are views of one buffer on `device` for each dtype among them.

    A copy for each factor would be a thousand for FLUX, and one from pageable memory blocks the host. The
    copies are queued on the current stream: the caller waits for them, before the adapter is used.
    """
    parts = [part for one in adapter.factors.values() for part in one.tensors]
    copies = iter(_copies(parts, device))
    factors = {
        layer: one.with_tensors([next(copies) for _ in one.tensors]) for layer, one in adapter.factors.items()
    }
    return replace(adapter, factors=factors)


def _copies(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Equal tensors on the device, in the same order."""
    found: dict[int, Tensor] = {}
    for dtype in {tensor.dtype for tensor in tensors}:
        own = [index for index, tensor in enumerate(tensors) if tensor.dtype is dtype]
        sizes = [tensors[index].numel() for index in own]
        packed = torch.empty(sum(sizes), dtype=dtype, pin_memory=torch.cuda.is_available())
        torch.cat([tensors[index].reshape(-1) for index in own], out=packed)
        pieces = packed.to(device, non_blocking=True).split(sizes)
        found |= {index: piece.view(tensors[index].shape) for index, piece in zip(own, pieces, strict=True)}
    return [found[index] for index in range(len(tensors))]
