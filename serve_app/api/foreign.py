"""The rule for dialects of clients that no one here can change: correct with a warning what the model does
not take, and name the dialect's own fields in errors and warnings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.card import Guidance, ModelCard, Steps
from deployments.protocol.errors import WeftError
from deployments.protocol.request import GenerationRequest
from deployments.validation.image_header import ImageSize
from deployments.validation.size import nearest_size

Names = Mapping[str, str]  # a dialect's name of a field, by that of a GenerationRequest or its parts


def fit_to_card(
    request: GenerationRequest, card: ModelCard
) -> tuple[GenerationRequest, tuple[Adjustment, ...]]:
    """The request with size, steps and guidance within the card's limits, and a warning for each change."""
    notices: list[Adjustment] = []
    changes: dict[str, object] = {}
    if (fitted := _fitted_size(request, card)) is not None:
        changes |= {"width": fitted.width, "height": fitted.height}
        message = f"{card.id} cannot make {request.width}x{request.height}; it made {fitted.width}x"
        notices.append(Adjustment("size_fitted", "width", f"{message}{fitted.height}"))
    limits: dict[str, Steps | Guidance] = {
        "num_inference_steps": card.steps,
        "guidance_scale": card.guidance,
    }
    for name, limit in limits.items():
        asked = getattr(request, name)
        if asked is None or limit.min <= asked <= limit.max or card.corrects:  # resolve warns of the last
            continue
        changes[name] = max(limit.min, min(limit.max, asked))
        message = f"{card.id} takes {name} {limit.min:g}-{limit.max:g}. Overriding {asked:g} -> "
        notices.append(Adjustment(f"{name}_fitted", name, f"{message}{changes[name]:g}"))
    return request.model_copy(update=changes), tuple(notices)


def _fitted_size(request: GenerationRequest, card: ModelCard) -> ImageSize | None:
    """The allowed size nearest to the one that is asked for; None: none is, or it is allowed."""
    if request.width is None and request.height is None:
        return None
    sizes = card.sizes
    ratio = sizes.width / sizes.height
    width = request.width or max(1, round((request.height or 1) * ratio))
    height = request.height or max(1, round(width / ratio))
    fitted = ImageSize(*nearest_size(ImageSize(width, height), sizes))
    if width == height:
        fitted = ImageSize(min(fitted), min(fitted))  # the limit of pixels may have taken a line of one side
    return None if fitted == (request.width, request.height) else fitted


def renamed_error(error: WeftError, names: Names) -> WeftError:
    """The error with the dialect's names of fields."""
    param = None if error.param is None else _renamed(error.param, names)
    return type(error)(_renamed(error.message, names), param=param, retry_after_s=error.retry_after_s)


def renamed_notice(notice: Adjustment, names: Names) -> Adjustment:
    """The warning with the dialect's names of fields."""
    return replace(notice, param=_renamed(notice.param, names), message=_renamed(notice.message, names))


def _renamed(text: str, names: Names) -> str:
    return re.sub(rf"\b({'|'.join(names)})\b", lambda match: names[match[0]], text)
