"""Where a pipeline takes the guidance scale of a request.

Pipelines of diffusers name it differently, and some have two scales of which one has no effect on the loaded
weights: Qwen-Image's `guidance_scale` is for weights that embed it, its classifier-free guidance is
`true_cfg_scale` and needs a negative prompt. Others take it from a guider, a component with state.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

from diffusers.guiders.guider_utils import BaseGuidance

from deployments.protocol.request import ResolvedRequest

EMBEDDED = "distilled_guidance_scale"  # HunyuanImage: of weights that embed it
WITHOUT_GUIDANCE = 1.0  # a scale
# of the first stage, in pipelines of two (Stable Cascade), and of the last frame (Stable Video Diffusion)
OTHER_NAMES = ("prior_guidance_scale", "decoder_guidance_scale", "max_guidance_scale")


def guidance_argument(pipeline: Any) -> str | None:
    """The parameter of the pipeline's __call__ that guides with these weights; None: there is none."""
    if _is_distilled(pipeline):
        return None
    return argument_of_class(type(pipeline), _embeds_guidance(pipeline))


def argument_of_class(pipeline_class: type, embeds: bool | None) -> str | None:
    """The same, where embeds says whether the denoiser embeds the scale; None: its config does not say."""
    defaults = _defaults(pipeline_class)
    if "true_cfg_scale" in defaults:
        if "guidance_scale" not in defaults:
            return "true_cfg_scale"
        is_optional = defaults["guidance_scale"] is None  # used by weights that embed it, and by no others
        if (defaults["true_cfg_scale"] or 0) > 1 and not (embeds and is_optional):
            return "true_cfg_scale"
        return None if embeds is False else "guidance_scale"
    if "guidance_scale" in defaults:
        return "guidance_scale"
    if EMBEDDED in defaults and embeds:
        return EMBEDDED
    return next((name for name in OTHER_NAMES if name in defaults), None)


def guidance_arguments(pipeline: Any, request: ResolvedRequest) -> dict[str, Any]:
    """The arguments that carry the request's guidance scale."""
    name = guidance_argument(pipeline)
    if name is None:
        # the default of some that are distilled is a scale, of which they log that it is ignored
        pipeline_class: type = type(pipeline)
        without = _is_distilled(pipeline) and "guidance_scale" in _defaults(pipeline_class)
        return {"guidance_scale": WITHOUT_GUIDANCE} if without else {}
    arguments: dict[str, Any] = {name: request.guidance_scale}
    kind: type = type(pipeline)
    if name == "true_cfg_scale" and "negative_prompt" in _defaults(kind):
        # classifier-free guidance is switched on by a negative prompt, which Qwen's examples have as a space
        guided = request.guidance_scale > 1
        arguments["negative_prompt"] = (request.negative_prompt or " ") if guided else None
    return arguments


def own_guiders(pipeline: Any, request: ResolvedRequest) -> dict[str, BaseGuidance]:
    """Guiders for one request, by their component's name: they have state, and this request's scale."""
    return {name: _guider_for(guider, request) for name, guider in _guiders(pipeline)}


def is_guided(pipeline: Any) -> bool:
    """Whether the request's guidance scale has an effect."""
    if _is_distilled(pipeline):
        return False
    return guidance_argument(pipeline) is not None or any(
        _takes_scale(guider) for _, guider in _guiders(pipeline)
    )


def _guider_for(guider: BaseGuidance, request: ResolvedRequest) -> BaseGuidance:
    changes = {"guidance_scale": request.guidance_scale} if _takes_scale(guider) else {}
    made: BaseGuidance = guider.new(**changes)
    return made


def _takes_scale(guider: BaseGuidance) -> bool:
    return "guidance_scale" in inspect.signature(type(guider).__init__).parameters


def _guiders(pipeline: Any) -> Iterator[tuple[str, BaseGuidance]]:
    for name, part in pipeline.components.items():
        if isinstance(part, BaseGuidance):
            yield name, part


def _is_distilled(pipeline: Any) -> bool:
    """Whether the pipeline's config says so and it then works without guidance, whatever the scale: FLUX.2
    klein, and not Krea 2, whose noise schedule alone depends on it."""
    if not (getattr(pipeline, "config", None) or {}).get("is_distilled"):
        return False
    asked = copy.copy(pipeline)
    vars(asked)["_guidance_scale"] = 2.0  # what a call sets
    return not getattr(asked, "do_classifier_free_guidance", False)


def _embeds_guidance(pipeline: Any) -> bool | None:
    """Whether the denoiser embeds the scale; None: its config does not say."""
    denoiser = pipeline.components.get("transformer")
    return None if denoiser is None else denoiser.config.get("guidance_embeds")


@cache
def _defaults(pipeline_class: type) -> dict[str, Any]:
    parameters = inspect.signature(pipeline_class.__call__).parameters
    return {name: parameter.default for name, parameter in parameters.items()}
