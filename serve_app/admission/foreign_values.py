"""What clients of other services ask for, brought within the limits of a model (pure).

Those clients cannot be changed: their sizes, steps and samplers are fixed in them. So a dialect of another
service corrects what the card does not allow, with a warning for each value; the native dialect refuses it.
"""

from __future__ import annotations

import math
import re
from typing import Any

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import GenerationRequest
from deployments.validation.image_header import ImageSize
from deployments.validation.size import nearest_size

RATIO = re.compile(r"([0-9]{1,4}):([0-9]{1,4})")
AUTO = "auto"


def fit_values(
    request: GenerationRequest, card: ModelCard, *, aspect_ratio: str | None = None
) -> tuple[GenerationRequest, tuple[Adjustment, ...]]:
    """The request with values that the card allows, and a warning for each that was changed.

    aspect_ratio: "16:9" in place of a size; ignored where there is one. The number of images and the length
    of a video are not changed: less than what was asked for is no answer. Raises BadRequest for an aspect
    ratio that cannot be read.
    """
    changes: dict[str, Any] = {}
    warnings: list[Adjustment] = []
    _fit_size(request, card, aspect_ratio, changes, warnings)
    _fit_steps(request, card, changes, warnings)
    _fit_guidance(request, card, changes, warnings)
    if request.scheduler != AUTO and request.scheduler not in card.schedulers:
        changes["scheduler"] = AUTO
        message = f"{card.id} has no noise scheduler {request.scheduler[:40]!r}. Overriding it -> auto"
        warnings.append(Adjustment("scheduler_corrected", "scheduler", message))
    longest = card.max_sequence_length
    if request.max_sequence_length is not None and longest != request.max_sequence_length:
        changes["max_sequence_length"] = None
        tokens = longest or "a fixed number of"
        message = f"{card.id} runs with {tokens} text tokens; max_sequence_length is ignored"
        warnings.append(Adjustment("sequence_length_corrected", "max_sequence_length", message))
    return (request.model_copy(update=changes) if changes else request), tuple(warnings)


def _fit_size(
    request: GenerationRequest,
    card: ModelCard,
    aspect_ratio: str | None,
    changes: dict[str, Any],
    warnings: list[Adjustment],
) -> None:
    """The allowed size nearest to the one asked for, with its aspect ratio as far as the limits permit."""
    asked = _asked_size(request, card, aspect_ratio)
    if asked is None:
        return
    width, height = nearest_size(asked, card.sizes)
    changes |= {"width": width, "height": height}
    if request.width not in (None, width) or request.height not in (None, height):
        message = f"{card.id} makes no {asked.width}x{asked.height}; the result is {width}x{height}"
        warnings.append(Adjustment("size_fitted", "size", message))


def _asked_size(request: GenerationRequest, card: ModelCard, aspect_ratio: str | None) -> ImageSize | None:
    """In pixels; None: the request leaves it to the model, or to the given picture."""
    sizes = card.sizes
    if request.width is not None and request.height is not None:
        return ImageSize(max(1, request.width), max(1, request.height))
    if request.width is not None or request.height is not None:
        if request.edit is not None or request.references:  # the other side is that of the given picture
            return None
        ratio = sizes.width / sizes.height
        width = request.width or round((request.height or 1) * ratio)
        return ImageSize(max(1, width), max(1, request.height or round(width / ratio)))
    if aspect_ratio in (None, AUTO):
        return None
    found = RATIO.fullmatch(str(aspect_ratio))
    if found is None or not int(found[1]) or not int(found[2]):
        raise BadRequest("aspect_ratio must be two numbers, such as '16:9'", param="aspect_ratio")
    ratio = int(found[1]) / int(found[2])
    area = sizes.width * sizes.height
    return ImageSize(max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio))))


def _fit_steps(
    request: GenerationRequest, card: ModelCard, changes: dict[str, Any], warnings: list[Adjustment]
) -> None:
    asked, steps = request.num_inference_steps, card.steps
    if asked is None or steps.min <= asked <= steps.max or card.corrects:
        return  # a card that corrects says so in its own words
    used = changes["num_inference_steps"] = max(steps.min, min(steps.max, asked))
    message = f"{card.id} runs {steps.min}-{steps.max} steps. Overriding {asked} -> {used}"
    warnings.append(Adjustment("steps_corrected", "num_inference_steps", message))


def _fit_guidance(
    request: GenerationRequest, card: ModelCard, changes: dict[str, Any], warnings: list[Adjustment]
) -> None:
    asked, guidance = request.guidance_scale, card.guidance
    if asked is None or guidance.min <= asked <= guidance.max or card.corrects:
        return
    used = changes["guidance_scale"] = max(guidance.min, min(guidance.max, asked))
    message = f"{card.id} takes guidance {guidance.min:g}-{guidance.max:g}. Overriding {asked:g} -> {used:g}"
    warnings.append(Adjustment("guidance_corrected", "guidance_scale", message))
