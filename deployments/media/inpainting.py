"""Inpainting around the pipeline: which area it sees, and how its pictures are put back into the given one.

The pipeline generates a picture of the request's size. What the mask keeps of it has gone through the VAE
and is not what the caller sent; therefore the given pixels are put back outside of the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from deployments.media import decode
from deployments.media.fitting import Size, contained, fitted, fitted_mask, padded
from deployments.media.masks import black_and_white, transition, whole_cells
from deployments.media.still import PREVIEW_SIDE
from deployments.protocol.request import FitMode, Grow, ResolvedEdit
from deployments.validation.image_header import ImageSize

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels
KEPT_PIXELS = 4_200_000  # of a canvas while its request waits and runs, 4 bytes each; larger: decoded again


@dataclass(frozen=True, slots=True)
class Area:
    """The part of the canvas that the pipeline generates, and where its picture shows it."""

    box: Box  # of the canvas
    frame: Size  # of the pipeline's picture
    inner: Box  # of that picture: what shows the box; the rest repeats its edge

    @classmethod
    def of(cls, box: Box, frame: Size) -> Area:
        return cls(box, frame, contained(_size(box), frame))

    def picture(self, canvas: Image.Image, *, black_border: bool = False) -> Image.Image:
        """The pipeline's view of a picture of the canvas."""
        shown = canvas.crop(self.box)
        if shown.size != _size(self.inner):
            shown = shown.resize(_size(self.inner), Image.Resampling.LANCZOS)
        return padded(shown, self.frame, black_border=black_border) if shown.size != self.frame else shown

    def mask(self, mask: Image.Image) -> Image.Image:
        """The pipeline's view of a mask of the canvas: L, 255 for every latent that a marked pixel is in."""
        shown = mask.crop(self.box).convert("F").resize(_size(self.inner), Image.Resampling.BOX)
        marked = np.zeros((self.frame[1], self.frame[0]), dtype=bool)
        left, top, right, bottom = self.inner
        marked[top:bottom, left:right] = np.asarray(shown) > 0
        return Image.fromarray(whole_cells(marked).astype(np.uint8) * 255)


@dataclass(frozen=True, slots=True)
class PasteBack:
    """The given picture, for finished pictures to be put into."""

    canvas: Callable[[], Image.Image]  # RGB
    small: Image.Image  # the same of at most PREVIEW_SIDE a side
    scale: float  # of `small`
    area: Area
    changed: Box | None  # of the canvas: mask and feather; None where the mask marks nothing
    weight: Image.Image  # L, of the size of `changed`: 255 is all generated

    def pictures(self, generated: Sequence[Image.Image]) -> list[Image.Image]:
        """The canvas with each generated picture in its mask and a smooth transition around it.

        Blocks; call it in a thread.
        """
        canvas = self.canvas()
        return [self._picture(canvas, picture) for picture in generated]

    def _picture(self, canvas: Image.Image, generated: Image.Image) -> Image.Image:
        result = canvas.copy()
        if self.changed is None:
            return result
        left, top, right, bottom = self.area.box
        shown = generated
        if self.area.inner != (0, 0, *generated.size):
            shown = shown.crop(self.area.inner)
        if shown.size != (right - left, bottom - top):
            shown = shown.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        inside = (
            self.changed[0] - left,
            self.changed[1] - top,
            self.changed[2] - left,
            self.changed[3] - top,
        )
        result.paste(shown.crop(inside), self.changed[:2], self.weight)
        return result

    def preview(self, rough: Image.Image) -> Image.Image:
        """The same in small, with a preview of the pipeline's picture."""
        small = self.small.copy()
        if self.changed is None:
            return small
        left, top, right, bottom = (round(edge * self.scale) for edge in self.changed)
        size = max(1, right - left), max(1, bottom - top)
        part = rough.resize(size, Image.Resampling.BICUBIC, box=self._rough_box(rough.size))
        small.paste(part, (left, top), self.weight.resize(size, Image.Resampling.BOX))
        return small

    def _rough_box(self, rough: Size) -> tuple[float, float, float, float]:
        """Where a preview of this size shows `changed`."""
        assert self.changed is not None, "there is something to show"
        x_scale, y_scale = rough[0] / self.area.frame[0], rough[1] / self.area.frame[1]
        left, top, right, bottom = self.area.inner
        x_zoom = (right - left) / (self.area.box[2] - self.area.box[0])
        y_zoom = (bottom - top) / (self.area.box[3] - self.area.box[1])
        xs = ((x - self.area.box[0]) * x_zoom + left for x in (self.changed[0], self.changed[2]))
        ys = ((y - self.area.box[1]) * y_zoom + top for y in (self.changed[1], self.changed[3]))
        (x0, x1), (y0, y1) = (x * x_scale for x in xs), (y * y_scale for y in ys)
        return max(0.0, x0), max(0.0, y0), min(float(rough[0]), x1), min(float(rough[1]), y1)


@dataclass(frozen=True, slots=True)
class Inpainting:
    """What the pipeline takes, and what becomes of its pictures."""

    image: Image.Image  # RGB, of the request's size
    mask: Image.Image  # L, only 0 (keep) and 255
    area: Area
    canvas_size: Size
    paste_back: PasteBack | None  # None: the pipeline's pictures are the result
    marked: float  # part of the canvas that the mask marks, 0..1
    on_white: bool  # whether the given picture was transparent somewhere


def prepare(edit: ResolvedEdit, size: Size, fit: FitMode) -> Inpainting:
    """Decode picture and mask of an edit that has one. size: of the request. Blocks; call it in a thread.

    Raises BadRequest or TooLarge naming the field of a picture that cannot be used.
    """
    given = decode.own_size(edit.image, "image")
    wanted = size
    if edit.result_width is not None and edit.result_height is not None:
        wanted = ImageSize(edit.result_width, edit.result_height)
    canvas, mask = _canvas(given, edit, wanted, fit), _mask(given.size, edit, wanted, fit)
    box = (0, 0, *canvas.size)
    if edit.only_masked:
        box = _masked_box(mask, max(edit.only_masked_padding, edit.feather), size)
    area = Area.of(box, size)
    return Inpainting(
        area.picture(canvas),
        area.mask(mask),
        area,
        canvas.size,
        _paste_back(canvas, mask, area, edit, fit) if edit.paste_back else None,
        float((np.asarray(mask) > 0).mean()),
        decode.is_on_white(given),
    )


def _canvas(given: Image.Image, edit: ResolvedEdit, size: Size, fit: FitMode) -> Image.Image:
    """The given picture with what it grows by, mirrored into the new area, in this size."""
    if edit.grow is not None:
        pixels = np.pad(np.asarray(given), (*_borders(edit.grow), (0, 0)), mode="symmetric")
        given = Image.fromarray(pixels)
    return fitted(given, size, fit) if given.size != size else given


def _canvas_again(edit: ResolvedEdit, size: Size, fit: FitMode) -> Image.Image:
    return _canvas(decode.own_size(edit.image, "image"), edit, size, fit)


def _mask(given_size: Size, edit: ResolvedEdit, size: Size, fit: FitMode) -> Image.Image:
    """The mask, black and white, in this size; it marks what the picture grows by, too.

    given_size: of the given picture, to which the given mask belongs.
    """
    grey = fitted_mask(_given_mask(edit, given_size), given_size, fit)
    if edit.grow is not None:
        grey = Image.fromarray(np.pad(np.asarray(grey), _borders(edit.grow), constant_values=255))
    return black_and_white(fitted_mask(grey, size, fit) if grey.size != size else grey)


def _borders(grow: Grow) -> tuple[tuple[int, int], tuple[int, int]]:
    return (grow.top, grow.bottom), (grow.left, grow.right)


def _given_mask(edit: ResolvedEdit, size: Size) -> Image.Image:
    """The mask of the request, L: brighter is more to be generated; black where only `grow` is asked for."""
    if edit.mask_image is not None:
        return decode.mask(edit.mask_image, edit.mask_channel, "mask_image")
    if edit.mask_channel == "alpha":
        return decode.mask(edit.image, "alpha", "image")
    return Image.new("L", size)


def _masked_box(mask: Image.Image, margin: int, frame: Size) -> Box:
    """The masked area with a margin, extended to the frame's aspect ratio as far as the picture allows."""
    box = mask.getbbox()
    if box is None:
        return 0, 0, *mask.size
    left, top, right, bottom = _extended(box, margin, mask.size)
    width, height = right - left, bottom - top
    wide, high = (
        max(width, round(height * frame[0] / frame[1])),
        max(height, round(width * frame[1] / frame[0])),
    )
    left, right = _widened(left, right, wide, mask.width)
    top, bottom = _widened(top, bottom, high, mask.height)
    return left, top, right, bottom


def _widened(start: int, end: int, length: int, limit: int) -> tuple[int, int]:
    """start..end widened on both sides to this length, moved or shortened to lie in 0..limit."""
    length = min(length, limit)
    start = min(max(0, start - (length - (end - start)) // 2), limit - length)
    return start, start + length


def _paste_back(
    canvas: Image.Image, mask: Image.Image, area: Area, edit: ResolvedEdit, fit: FitMode
) -> PasteBack:
    is_large = canvas.width * canvas.height > KEPT_PIXELS
    canvas_of = partial(_canvas_again, edit, canvas.size, fit) if is_large else (lambda: canvas)
    scale = min(1.0, PREVIEW_SIDE / max(canvas.size))
    small = _scaled(canvas, scale)
    box = mask.getbbox()
    if box is None or edit.strength == 0:
        return PasteBack(canvas_of, small, scale, area, None, Image.new("L", (1, 1)))
    left, top, right, bottom = _extended(box, edit.feather, canvas.size)
    edges = area.box  # with only_masked there is nothing outside of it
    changed = max(left, edges[0]), max(top, edges[1]), min(right, edges[2]), min(bottom, edges[3])
    return PasteBack(canvas_of, small, scale, area, changed, transition(mask.crop(changed), edit.feather))


def _extended(box: Box, margin: int, size: Size) -> Box:
    left, top, right, bottom = box
    return (
        max(0, left - margin),
        max(0, top - margin),
        min(size[0], right + margin),
        min(size[1], bottom + margin),
    )


def _size(box: Box) -> Size:
    return box[2] - box[0], box[3] - box[1]


def _scaled(picture: Image.Image, scale: float) -> Image.Image:
    if scale == 1.0:
        return picture.copy()
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
