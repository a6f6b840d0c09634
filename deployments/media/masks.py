"""Pixels of masks: which are marked, and how the new part fades into the old."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

MARKED = 128  # grey values from here on are generated anew
CELL = 8  # pixels of one latent of the usual VAEs; pipelines look at one mask pixel of each


def black_and_white(grey: Image.Image) -> Image.Image:
    """The mask, L, with 0 (keep) and 255 only."""
    return grey.point(lambda value: 255 * (value >= MARKED))


def transition(mask: Image.Image, feather: int) -> Image.Image:
    """255 in the mask, smoothly falling to 0 over `feather` pixels outside of it."""
    import cv2

    if not feather:
        return mask
    outside = (np.asarray(mask) == 0).astype(np.uint8)
    if not outside.any():
        return mask
    distance: npt.NDArray[Any] = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    share = np.clip(1 - distance / (feather + 1), 0, 1)
    smooth = share * share * (3 - 2 * share)
    return Image.fromarray((255 * smooth * (distance <= feather)).round().astype(np.uint8))


def whole_cells(marked: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The mask (H, W) with every cell of latents marked that has a marked pixel, so that none is missed."""
    height, width = marked.shape
    whole = np.pad(marked, ((0, -height % CELL), (0, -width % CELL)))
    cells = whole.reshape(whole.shape[0] // CELL, CELL, whole.shape[1] // CELL, CELL).any(axis=(1, 3))
    return cells.repeat(CELL, axis=0).repeat(CELL, axis=1)[:height, :width]
