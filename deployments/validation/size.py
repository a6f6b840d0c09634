"""The width and height of a result: as requested, of an input picture, or the card's default (pure)."""

from __future__ import annotations

import math

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.card import Sizes
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import GenerationRequest
from deployments.validation.fitting import GivenSizes
from deployments.validation.image_header import ImageSize


def resolve_size(request: GenerationRequest, given: GivenSizes, sizes: Sizes) -> tuple[int, int]:
    """Width and height in pixels that the model works at.

    Where the request names none: the allowed size nearest to the given picture, or to the first control
    picture, or to a video's last frame where its first is not given; for an edit the aspect ratio of the
    first reference picture with about as many pixels as the card's default, as the pipelines of editing
    models have it; else the card's default. The masked area alone is scaled to the card's default. Raises
    BadRequest for a size outside the card's limits.
    """
    source = _source_size(request, given, sizes)
    if request.width is None and request.height is None:
        return (sizes.width, sizes.height) if source is None else nearest_size(source, sizes)
    ratio = sizes.width / sizes.height if source is None else source.width / source.height
    if request.width is not None:
        width, height = request.width, request.height or _on_grid(request.width / ratio, sizes)
    else:
        assert request.height is not None, "one of both is given"
        width, height = _on_grid(request.height * ratio, sizes), request.height
    _check_size(width, height, sizes)
    return width, height


def size_adjustments(
    request: GenerationRequest, given: GivenSizes, size: tuple[int, int]
) -> list[Adjustment]:
    """A warning where the result of an edit cannot have the size of its first reference picture."""
    asks = request.width is not None or request.height is not None
    first = given.references[0] if given.references else None
    if asks or first is None or tuple(first) == size:
        return []
    return [
        Adjustment(
            "size_fitted",
            "width",
            f"the first reference picture is {first.width}x{first.height}; the result is "
            f"{size[0]}x{size[1]}, about as large as the model was trained for; width and height choose "
            "another size",
        )
    ]


def _source_size(request: GenerationRequest, given: GivenSizes, sizes: Sizes) -> ImageSize | None:
    """The size of the picture that the working size follows."""
    if request.edit is not None:
        return None if request.edit.is_masked and request.edit.only_masked else given.canvas
    if given.references and given.references[0] is not None:
        first = given.references[0]
        scale = math.sqrt(sizes.width * sizes.height / (first.width * first.height))
        return ImageSize(max(1, round(first.width * scale)), max(1, round(first.height * scale)))
    return given.controls[0] if given.controls else given.last_image


def _check_size(width: int, height: int, sizes: Sizes) -> None:
    for field, side in (("width", width), ("height", height)):
        if not sizes.min <= side <= sizes.max or side % sizes.multiple:
            raise BadRequest(
                f"{field} is {side}; it must be {sizes.min}-{sizes.max} and a multiple of "
                f"{sizes.multiple} (nearest: {_on_grid(side, sizes)})",
                param=field,
            )
    if width * height > sizes.max_pixels:
        raise BadRequest(
            f"{width}x{height} is {width * height} pixels; at most {sizes.max_pixels}", param="width"
        )
    if max(width, height) > sizes.max_aspect * min(width, height):
        raise BadRequest(
            f"{width}x{height} has too long a side; at most {sizes.max_aspect:g} to 1", param="width"
        )


def nearest_size(source: ImageSize, sizes: Sizes) -> tuple[int, int]:
    """The allowed size nearest to the picture's own, with its aspect ratio as far as the limits permit."""
    limit = min(sizes.max / max(source), math.sqrt(sizes.max_pixels / (source.width * source.height)))
    scale = min(max(1.0, sizes.min / min(source)), limit)
    width, height = (_on_grid(side * scale, sizes) for side in source)
    longest = math.floor(sizes.max_aspect * min(width, height) / sizes.multiple) * sizes.multiple
    width, height = min(width, longest), min(height, longest)
    while width * height > sizes.max_pixels:  # rounding up may pass the limit by one grid line
        width, height = (
            (width - sizes.multiple, height) if width >= height else (width, height - sizes.multiple)
        )
    if source.width == source.height:  # a square stays one
        width = height = min(width, height)
    return width, height


def _on_grid(side: float, sizes: Sizes) -> int:
    """The allowed side nearest to this one, in pixels."""
    return max(sizes.min, min(sizes.max, round(side / sizes.multiple) * sizes.multiple))
