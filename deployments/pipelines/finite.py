"""Numbers that are not finite: a model that overflows makes black pictures, which no one is to get."""

from __future__ import annotations

import torch
from torch import Tensor

from deployments.protocol.errors import NotFinite


def check_finite_pixels(pixels: Tensor) -> None:
    """Raises NotFinite for NaN or infinity in what a VAE has decoded."""
    if not bool(torch.isfinite(pixels).all()):
        raise not_finite("the VAE", pixels.dtype)


def not_finite(what: str, dtype: torch.dtype) -> NotFinite:
    """The error for a result with NaN or infinity. what: computed it. dtype: that it computes in."""
    cure = "another seed, less guidance or weights.dtype float32 in the card may help"
    if dtype is torch.float16:
        cure = (
            "it computes in float16, whose largest number is 65504: weights.dtype float32 in the card cures "
            "that, or a GPU that has bfloat16 (NVIDIA's since Ampere)"
        )
    return NotFinite(
        f"{what} returned numbers that are not finite (NaN), so the picture would be black; {cure}"
    )
