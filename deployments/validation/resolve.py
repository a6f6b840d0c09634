"""A wish held against a model card: the request that will run, or the reason it cannot (pure).

Both floors call `fit`: the API before a job is accepted, and the replica again, because a call by
handle skips HTTP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from deployments.protocol.card import ModelCard, Sizes
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import (
    MAX_CONTROLS,
    MAX_SEED,
    Control,
    GenerationRequest,
    ResolvedEdit,
    ResolvedRequest,
    Task,
)
from deployments.validation import image_header
from deployments.validation.video import resolve_video


@dataclass(frozen=True, slots=True)
class Adjustment:
    """One value the card replaced; told to the caller as a warning."""

    code: str
    param: str
    message: str


class Resolved(NamedTuple):
    request: ResolvedRequest
    adjustments: tuple[Adjustment, ...]


def resolve(request: GenerationRequest, card: ModelCard, *, fresh_seed: int) -> Resolved:
    """The request with every blank filled from the card, checked against all its limits.

    fresh_seed: used where the caller gave none, 0..2^63-1.
    Raises BadRequest (TooLarge for pictures) naming the field, the cause and what would be right.
    Fitting a fitted request changes nothing and corrects nothing.
    """
    if request.task not in card.tasks:
        raise BadRequest(
            f"{card.id} cannot do {request.task.value}; it can do {', '.join(card.tasks)}",
            param="refine" if request.refine else "edit" if request.edit else "model",
        )
    _check_refine(request)
    _check_text(request, card)
    _check_controls(request, card)
    _check_loras(request, card)
    adjustments: list[Adjustment] = []
    width, height = _size(request, card.sizes)
    steps = _steps(request, card, adjustments)
    seed = fresh_seed if request.seed is None else request.seed
    if seed + request.num_images - 1 > MAX_SEED:
        raise BadRequest(f"seed must be at most {MAX_SEED} less the pictures after the first", param="seed")
    resolved = ResolvedRequest(
        model=card.id,
        prompt=request.prompt,
        negative_prompt=_negative_prompt(request, card, adjustments),
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=_guidance(request, card, adjustments),
        seed=seed,
        num_images=request.num_images,
        scheduler=_scheduler(request, card, adjustments),
        max_sequence_length=_sequence_length(request, card, adjustments),
        edit=_edit(request, card),
        controls=request.controls,
        loras=request.loras,
        refine=request.refine,
        refiner=_refiner(request, card, steps),
        output=request.output,
        video=resolve_video(request, card, width, height, seed),
        priority=request.priority,
        deadline_s=request.deadline_s,
    )
    if denoising_steps(resolved, card) < 1 and resolved.edit is not None and resolved.edit.strength > 0:
        # diffusers would fail later with "the number of steps is < 1"; strength 0 is the picture itself
        raise BadRequest(
            f"strength {resolved.edit.strength} of {steps} steps leaves no step to run; "
            f"use strength 0 or at least {math.ceil(1000 / steps) / 1000}",
            param="strength",
        )
    return Resolved(resolved, tuple(adjustments))


def denoising_steps(request: ResolvedRequest, card: ModelCard) -> int:
    """Steps that will really run: img2img skips the first (1 - strength) part of them.

    Diffusers' FLUX pipelines round the skipped steps down, the others the remaining ones. Noise
    schedulers of second order (heun) call the model more often; events.Step counts what they do.
    """
    steps = request.num_inference_steps
    if request.edit is None or _is_first_frame(request):
        return steps
    if request.edit.strength == 0:
        return 0
    if card.family == "flux":
        return steps - int(steps - steps * request.edit.strength)
    return min(steps, int(steps * request.edit.strength))


def _is_first_frame(request: ResolvedRequest) -> bool:
    return request.video is not None and not request.video.framewise


def control_field(request: GenerationRequest, index: int) -> str:
    """What a control picture is called in messages: as the dialects name it."""
    return "control_image" if len(request.controls) == 1 else f"controls.{index}.image"


def _check_refine(request: GenerationRequest) -> None:
    if not request.refine:
        return
    if request.edit is None:
        raise BadRequest("refine needs a picture; send image too", param="image")
    if request.edit.mask_image is not None:
        raise BadRequest("refine works on the whole picture; leave mask_image out", param="mask_image")
    if request.controls:
        raise BadRequest("refine follows the given picture; leave control pictures out", param="controls")


def _check_controls(request: GenerationRequest, card: ModelCard) -> None:
    """Raises for the first control picture that this model cannot take; headers only are read."""
    if len(request.controls) > MAX_CONTROLS:
        raise BadRequest(
            f"there are {len(request.controls)} control pictures; at most {MAX_CONTROLS}", param="controls"
        )
    for index, control in enumerate(request.controls):
        if control.type not in card.controls:
            able = f"it takes {', '.join(card.controls)}" if card.controls else "it takes none"
            raise BadRequest(
                f"{card.id} takes no control picture of type {control.type}; {able}", param="control_type"
            )
        if control.start >= control.end:
            raise BadRequest(
                f"control starts at {control.start:g} and ends at {control.end:g} of the steps; "
                "start must be below end",
                param="control_start",
            )
        _check_map(control, card)
        if control.image:  # empty: kept elsewhere, and inspected before
            image_header.inspect(control.image, control_field(request, index))


def _check_loras(request: GenerationRequest, card: ModelCard) -> None:
    if not request.loras:
        return
    able = card.max_loras if card.serving.lora != "none" else 0
    if not able:
        raise BadRequest(f"{card.id} takes no LoRA; leave loras out", param="loras")
    if len(request.loras) > able:
        raise BadRequest(
            f"there are {len(request.loras)} LoRAs; {card.id} takes at most {able} at once", param="loras"
        )


def _check_map(control: Control, card: ModelCard) -> None:
    """Canny edges we can find in any picture; depth and pose only through a model of the card."""
    if control.type == "canny" or control.is_map or card.controls[control.type].preprocessor is not None:
        return
    raise BadRequest(
        f"{card.id} cannot find the {control.type} in a plain picture; send a {control.type} map "
        "and say is_map: true",
        param="control_image",
    )


def _refiner(request: GenerationRequest, card: ModelCard, steps: int) -> float | None:
    """The part of the steps at which the refiner takes over, or None."""
    if request.refiner is None or request.refiner is False:
        return None
    if card.refiner is None:
        raise BadRequest(f"{card.id} has no refiner; leave refiner out", param="refiner")
    if request.task is not Task.t2i:
        raise BadRequest(
            "refiner takes over from text-to-image only; refine a finished picture with "
            f"model {card.refiner} and refine",
            param="refiner",
        )
    if steps < 2:
        raise BadRequest(
            "refiner needs a step for each of two models; use at least 2 steps", param="num_inference_steps"
        )
    return card.refiner_start if request.refiner is True else request.refiner


def _check_text(request: GenerationRequest, card: ModelCard) -> None:
    for field, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        if len(text) > card.max_prompt_chars:
            raise BadRequest(
                f"{field} has {len(text)} characters; {card.id} takes at most {card.max_prompt_chars}",
                param=field,
            )
    if not request.prompt.strip():
        raise BadRequest("prompt is empty; say what the picture shall show", param="prompt")
    if request.num_images > card.max_images:
        raise BadRequest(
            f"num_images is {request.num_images}; {card.id} makes at most {card.max_images} at once",
            param="num_images",
        )


def _size(request: GenerationRequest, sizes: Sizes) -> tuple[int, int]:
    """Width and height in pixels: as asked, of the given or first control picture, or the card's default."""
    source = None
    if request.edit is not None and request.edit.image:
        source = image_header.inspect(request.edit.image, "image")
        if request.edit.mask_image is not None:
            image_header.inspect(request.edit.mask_image, "mask_image")
    elif request.edit is None and request.controls and request.controls[0].image:
        source = image_header.inspect(request.controls[0].image, control_field(request, 0))
    if request.width is None and request.height is None:
        return (sizes.width, sizes.height) if source is None else _nearest_size(source, sizes)
    ratio = sizes.width / sizes.height if source is None else source.width / source.height
    if request.width is not None:
        width, height = request.width, request.height or _on_grid(request.width / ratio, sizes)
    else:
        assert request.height is not None, "one of both is given"
        width, height = _on_grid(request.height * ratio, sizes), request.height
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
        raise BadRequest(f"{width}x{height} is too long; at most {sizes.max_aspect:g} to 1", param="width")
    return width, height


def _nearest_size(source: image_header.ImageSize, sizes: Sizes) -> tuple[int, int]:
    """The allowed size nearest to the picture's own, keeping its shape where the limits let it."""
    limit = min(sizes.max / max(source), math.sqrt(sizes.max_pixels / (source.width * source.height)))
    scale = min(max(1.0, sizes.min / min(source)), limit)
    width, height = (_on_grid(side * scale, sizes) for side in source)
    longest = math.floor(sizes.max_aspect * min(width, height) / sizes.multiple) * sizes.multiple
    width, height = min(width, longest), min(height, longest)
    while width * height > sizes.max_pixels:  # rounding up may pass the limit by one grid line
        width, height = (
            (width - sizes.multiple, height) if width >= height else (width, height - sizes.multiple)
        )
    return width, height


def _on_grid(side: float, sizes: Sizes) -> int:
    return max(sizes.min, min(sizes.max, round(side / sizes.multiple) * sizes.multiple))


def _steps(request: GenerationRequest, card: ModelCard, adjustments: list[Adjustment]) -> int:
    asked, steps = request.num_inference_steps, card.steps
    if asked is None:
        return steps.default
    if steps.min <= asked <= steps.max:
        return asked
    if not card.corrects:
        raise BadRequest(
            f"num_inference_steps is {asked}; {card.id} runs {steps.min}-{steps.max}",
            param="num_inference_steps",
        )
    used = max(steps.min, min(steps.max, asked))
    name = card.family.upper()
    rule = f"exactly {used}" if steps.min == steps.max else f"{steps.min} to {steps.max}"
    adjustments.append(
        Adjustment(
            "steps_corrected",
            "num_inference_steps",
            f"{name} requires {rule} steps. Overriding {asked} -> {used}",
        )
    )
    return used


def _guidance(request: GenerationRequest, card: ModelCard, adjustments: list[Adjustment]) -> float:
    asked, guidance = request.guidance_scale, card.guidance
    if asked is None:
        return guidance.default
    if guidance.min <= asked <= guidance.max:
        return asked
    if not card.corrects:
        raise BadRequest(
            f"guidance_scale is {asked:g}; {card.id} takes {guidance.min:g}-{guidance.max:g}",
            param="guidance_scale",
        )
    used = max(guidance.min, min(guidance.max, asked))
    adjustments.append(
        Adjustment(
            "guidance_corrected",
            "guidance_scale",
            f"{card.id} was trained for guidance_scale {used:g}. Overriding {asked:g} -> {used:g}",
        )
    )
    return used


def _negative_prompt(request: GenerationRequest, card: ModelCard, adjustments: list[Adjustment]) -> str:
    if card.negative_prompt or not request.negative_prompt:
        return request.negative_prompt
    adjustments.append(
        Adjustment(
            "negative_prompt_ignored",
            "negative_prompt",
            f"{card.id} has no negative prompt; it was left out",
        )
    )
    return ""


def _scheduler(request: GenerationRequest, card: ModelCard, adjustments: list[Adjustment]) -> str:
    if request.scheduler == "auto" or request.scheduler in card.schedulers:
        return request.scheduler
    if not card.corrects:
        raise BadRequest(
            f"scheduler {request.scheduler!r} is not one of {card.id}'s: {', '.join(card.schedulers)}",
            param="scheduler",
        )
    adjustments.append(
        Adjustment(
            "scheduler_corrected",
            "scheduler",
            f"{card.id} keeps its own noise scheduler. Overriding {request.scheduler} -> auto",
        )
    )
    return "auto"


def _sequence_length(
    request: GenerationRequest, card: ModelCard, adjustments: list[Adjustment]
) -> int | None:
    """Text tokens; one number per model, because requests of different lengths share no forward."""
    asked, used = request.max_sequence_length, card.max_sequence_length
    if asked is None or asked == used:
        return used
    if used is None:
        raise BadRequest(f"{card.id} has no max_sequence_length; leave it out", param="max_sequence_length")
    if not card.corrects and asked > used:
        raise BadRequest(
            f"max_sequence_length is {asked}; {card.id} takes {used}", param="max_sequence_length"
        )
    adjustments.append(
        Adjustment(
            "sequence_length_corrected",
            "max_sequence_length",
            f"{card.id} runs with {used} text tokens. Overriding {asked} -> {used}",
        )
    )
    return used


def _edit(request: GenerationRequest, card: ModelCard) -> ResolvedEdit | None:
    if request.edit is None:
        return None
    strength = card.strength if request.edit.strength is None else request.edit.strength
    if request.video is not None and card.videos is not None and not card.videos.framewise:
        strength = 1.0
    return ResolvedEdit(image=request.edit.image, mask_image=request.edit.mask_image, strength=strength)
