"""Finished pictures on their way from the device, for which the engine's thread does not wait."""

from __future__ import annotations

from typing import Any

from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from deployments.pipelines.finite import check_finite_pixels
from deployments.pipelines.transfers import HostCopy


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
        """Call it in the fiber. pixels: (B, C, H, W) in 0..1."""
        self._pixels = HostCopy(pixels)

    def pictures(self) -> list[Image.Image]:
        """The pictures that the pipeline would give as "pil", bit for bit. Blocks; call it in a thread.

        Raises NotFinite for pixels that are no numbers.
        """
        pixels = self._pixels.wait()
        check_finite_pixels(pixels)
        return list(VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pixels)))
