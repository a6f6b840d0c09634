"""Pictures of one aspect ratio laid into another: cropped, padded or stretched."""

from __future__ import annotations

import numpy as np
from PIL import Image

from deployments.protocol.request import FitMode
from deployments.validation.fitting import cropped_size, padded_size, same_aspect

Size = tuple[int, int]  # width and height in pixels


def fitted(picture: Image.Image, size: Size, fit: FitMode, *, black_border: bool = False) -> Image.Image:
    """The picture, RGB, in this size. black_border: pad with black instead of the picture's outer pixels."""
    shown = with_aspect(picture, size, fit, black_border=black_border)
    return shown if shown.size == size else shown.resize(size, Image.Resampling.LANCZOS)


def fitted_mask(mask: Image.Image, size: Size, fit: FitMode) -> Image.Image:
    """The mask, L, in this size; black where it is padded. Scaled up it keeps its edges."""
    shown = with_aspect(mask, size, fit, black_border=True)
    return shown if shown.size == size else shown.resize(size, Image.Resampling.BOX)


def with_aspect(picture: Image.Image, size: Size, fit: FitMode, *, black_border: bool = False) -> Image.Image:
    """The picture unscaled, with the aspect ratio of `size` by cropping or padding around its middle.

    Unchanged where it is to be stretched, or differs by rounding only.
    """
    if fit == "stretch" or same_aspect(picture.size, size):
        return picture
    if fit == "crop":
        width, height = cropped_size(picture.size, size)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        return picture.crop((left, top, left + width, top + height))
    return padded(picture, padded_size(picture.size, size), black_border=black_border)


def with_area(picture: Image.Image, pixels: int) -> Image.Image:
    """The picture scaled to about so many pixels, with its aspect ratio."""
    scale = (pixels / (picture.width * picture.height)) ** 0.5
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


def padded(picture: Image.Image, size: Size, *, black_border: bool = False) -> Image.Image:
    """The picture in the middle of a larger one."""
    left, top = _offset(picture.size, size)
    widths = ((top, size[1] - picture.height - top), (left, size[0] - picture.width - left))
    pixels = np.asarray(picture)
    depth = ((0, 0),) * (pixels.ndim - 2)
    return Image.fromarray(np.pad(pixels, widths + depth, mode="constant" if black_border else "edge"))


def contained(size: Size, frame: Size) -> tuple[int, int, int, int]:
    """Where a picture of `size`, scaled as a whole, lies in the middle of a frame: left, top, right, bottom.

    All of the frame where both have the same aspect ratio, up to rounding.
    """
    if same_aspect(size, frame):
        return (0, 0, *frame)
    scale = min(frame[0] / size[0], frame[1] / size[1])
    width, height = (max(1, round(side * scale)) for side in size)
    left, top = _offset((width, height), frame)
    return left, top, left + width, top + height


def _offset(size: Size, frame: Size) -> tuple[int, int]:
    return (frame[0] - size[0]) // 2, (frame[1] - size[1]) // 2
