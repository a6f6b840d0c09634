"""How given pictures of one size are laid into another: what is cut, added or distorted (pure)."""

from __future__ import annotations

from typing import NamedTuple

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.errors import TooLarge
from deployments.protocol.request import Edit, FitMode, GenerationRequest, ResolvedEdit, ResolvedRequest
from deployments.sandbox.decoder_child import MAX_PIXELS
from deployments.validation.image_header import ImageSize, read_image_size
from deployments.validation.inputs import control_field, reference_field

ASPECT_TOLERANCE = 0.01  # sides are multiples of 8 or 16 pixels; so little is distorted instead of cut


class GivenSizes(NamedTuple):
    """Sizes of the upright pictures of a request; None where there is none, or it is detached."""

    canvas: ImageSize | None  # image, with what `grow` adds
    image: ImageSize | None
    mask: ImageSize | None
    controls: tuple[ImageSize | None, ...]
    references: tuple[ImageSize | None, ...] = ()
    last_image: ImageSize | None = None  # of a video


def read_sizes(request: GenerationRequest) -> GivenSizes:
    """The sizes in the headers of the request's pictures.

    Raises BadRequest or TooLarge as read_image_size does, TooLarge also for a picture that grows too large.
    """
    controls = tuple(
        _size(control.image, control_field(request, index)) for index, control in enumerate(request.controls)
    )
    references = tuple(
        _size(picture, reference_field(request, index)) for index, picture in enumerate(request.references)
    )
    edit, video = request.edit, request.video
    last_image = None if video is None else _size(video.last_image, "last_image")
    if edit is None:
        return GivenSizes(None, None, None, controls, references, last_image)
    image, mask = _size(edit.image, "image"), _size(edit.mask_image, "mask_image")
    canvas = None if image is None else _grown(image, edit)
    return GivenSizes(canvas, image, mask, controls, last_image=last_image)


def result_size(request: GenerationRequest, canvas: ImageSize | None) -> ImageSize | None:
    """The size of the finished picture; None: that of the request.

    A picture that is put back where the mask keeps it is not scaled, unless the caller asks for a size.
    """
    edit = request.edit
    if isinstance(edit, ResolvedEdit):
        if edit.result_width is None or edit.result_height is None:
            return None
        return ImageSize(edit.result_width, edit.result_height)
    if edit is None or not edit.is_masked or not edit.paste_back:
        return None
    asks_for_size = request.width is not None or request.height is not None
    return None if asks_for_size and not edit.only_masked else canvas


def fit_adjustments(request: GenerationRequest, given: GivenSizes, result: ImageSize) -> list[Adjustment]:
    """A warning for every picture whose aspect ratio had to change.

    result: width and height of the finished picture. A resolved request has had its warnings before.
    """
    if isinstance(request, ResolvedRequest):
        return []
    pairs = [
        ("image", given.canvas, result),
        ("mask_image", given.mask, given.image),
        ("last_image", given.last_image, result),
    ]
    pairs += [(control_field(request, k), size, result) for k, size in enumerate(given.controls)]
    return [
        Adjustment("input_fitted", field, _message(field, size, target, request.fit))
        for field, size, target in pairs
        if size is not None and target is not None and not same_aspect(size, target)
    ]


def same_aspect(size: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether two sizes differ in aspect ratio by less than their rounding to the model's grid explains."""
    one, other = size[0] * target[1], size[1] * target[0]
    return abs(one - other) <= ASPECT_TOLERANCE * max(one, other)


def cropped_size(size: tuple[int, int], target: tuple[int, int]) -> ImageSize:
    """The largest part of a picture that has the aspect ratio of `target`, in the picture's own pixels."""
    (width, height), (target_width, target_height) = size, target
    if width * target_height > height * target_width:
        return ImageSize(max(1, round(height * target_width / target_height)), height)
    return ImageSize(width, max(1, round(width * target_height / target_width)))


def padded_size(size: tuple[int, int], target: tuple[int, int]) -> ImageSize:
    """The smallest picture of the aspect ratio of `target` that holds all of one of `size`."""
    (width, height), (target_width, target_height) = size, target
    if width * target_height > height * target_width:
        return ImageSize(width, max(height, round(width * target_height / target_width)))
    return ImageSize(max(width, round(height * target_width / target_height)), height)


def _size(data: bytes | None, field: str) -> ImageSize | None:
    return read_image_size(data, field) if data else None


def _grown(image: ImageSize, edit: Edit) -> ImageSize:
    if edit.grow is None:
        return image
    grow = edit.grow
    grown = ImageSize(image.width + grow.left + grow.right, image.height + grow.top + grow.bottom)
    if grown.width * grown.height > MAX_PIXELS:
        raise TooLarge(
            f"image grows from {image.width}x{image.height} to {grown.width}x{grown.height}; "
            f"at most {MAX_PIXELS // 1_000_000} megapixels",
            param="grow",
        )
    return grown


def _message(field: str, size: ImageSize, target: ImageSize, fit: FitMode) -> str:
    match fit:
        case "crop":
            part = cropped_size(size, target)
            how = f"cropped to its middle {part.width}x{part.height}; fit: pad keeps all of it"
        case "pad":
            whole = padded_size(size, target)
            how = f"padded to {whole.width}x{whole.height}; fit: crop adds no border"
        case _:
            how = "stretched; fit: crop and fit: pad keep its aspect ratio"
    return (
        f"{field} is {size.width}x{size.height}, which has another aspect ratio than "
        f"{target.width}x{target.height}; it was {how}"
    )
