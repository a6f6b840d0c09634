"""Finished pictures on their way from the device, for which the engine's thread does not wait."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor


def can_wait(pipeline: Any) -> bool:
    """Whether this pipeline's pictures are those of `PendingPictures` over its output of output_type "pt"."""
    processor = getattr(pipeline, "image_processor", None)
    return (
        isinstance(processor, VaeImageProcessor)
        and type(processor).postprocess is VaeImageProcessor.postprocess
    )


class PendingPictures:
    """The pictures of one request, which its pipeline has given as pixels on the device."""

    def __init__(self, pixels: Tensor) -> None:
        """Call it on the thread and the stream on which the pixels were computed.

        pixels: (B, C, H, W) in 0..1.
        """
        self._copied: Any = None
        if pixels.is_cuda:
            on_host = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
            on_host.copy_(pixels, non_blocking=True)
            self._copied = torch.cuda.Event(blocking=True)  # the thread that waits sleeps
            self._copied.record()
            pixels = on_host
        self._pixels = pixels

    def pictures(self) -> list[Image.Image]:
        """The pictures that the pipeline would give as "pil", bit for bit. Blocks; call it in a thread."""
        if self._copied is not None:
            self._copied.synchronize()
        return list(VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(self._pixels)))
