"""A request and a model card to a request in which everything is decided, or the reason for its refusal
(pure)."""

from __future__ import annotations

import math
from typing import NamedTuple

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import (
    MAX_SEED,
    Edit,
    Exactness,
    GenerationRequest,
    ResolvedEdit,
    ResolvedRequest,
    Task,
)
from deployments.validation.fitting import fit_adjustments, read_sizes, result_size
from deployments.validation.image_header import ImageSize
from deployments.validation.inputs import check_inputs, check_reference_size
from deployments.validation.size import resolve_size, size_adjustments
from deployments.validation.video import resolve_video

# families (protocol/family.py) whose pipelines round down the steps that a strength leaves
ROUNDED_DOWN = frozenset(
    """animate_diff cog_video_x consis_id easy_animate if if_super_resolution kandinsky kandinsky3
    kandinsky_v22 kandinsky_v22_prior_emb2_emb kolors latent_consistency_model ltx sd sd_depth2_img sdxl
    sdxl_union wan""".split()
)


class Resolved(NamedTuple):
    request: ResolvedRequest
    adjustments: tuple[Adjustment, ...]


def resolve(request: GenerationRequest, card: ModelCard, *, fresh_seed: int) -> Resolved:
    """The request with every blank filled from the card, checked against all its limits.

    fresh_seed: used where the caller gave none, 0..2^63-1.
    Raises BadRequest (TooLarge for pictures) naming the field, the cause and what would be right. A resolved
    request resolves to itself, without adjustments.
    """
    if request.task not in card.tasks:
        raise BadRequest(
            f"{card.id} cannot do {request.task.value}; it can do {', '.join(card.tasks)}",
            param=_task_field(request),
        )
    check_inputs(request, card)
    adjustments: list[Adjustment] = []
    given = read_sizes(request)
    for index, size in enumerate(given.references):
        if size is not None:
            check_reference_size(request, index, size, card)
    width, height = resolve_size(request, given, card.sizes)
    adjustments += size_adjustments(request, given, (width, height))
    result = result_size(request, given.canvas)
    adjustments += fit_adjustments(request, given, result or ImageSize(width, height))
    steps, seed = _steps(request, card, adjustments), _seed(request, fresh_seed)
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
        edit=_edit(request, card, result),
        references=request.references,
        controls=request.controls,
        fit=request.fit,
        loras=request.loras,
        refine=request.refine,
        refiner=_refiner(request, card, steps),
        output=request.output,
        video=resolve_video(request, card, width, height, seed),
        priority=request.priority,
        deadline_s=request.deadline_s,
        exact=_exactness(request, card, adjustments),
    )
    _check_strength(resolved, card)
    return Resolved(resolved, tuple(adjustments))


def _task_field(request: GenerationRequest) -> str:
    """The field that asks for the request's task."""
    if request.refine:
        return "refine"
    if request.references:
        return "reference_images"
    if request.video is not None and request.video.last_image is not None and request.edit is None:
        return "last_image"
    return "edit" if request.edit else "model"


def denoising_steps(request: ResolvedRequest, card: ModelCard) -> int:
    """Steps that will really run: img2img skips the first (1 - strength) part of them.

    Diffusers' older pipelines round the remaining steps down (ROUNDED_DOWN), the others the skipped ones.
    Noise schedulers of second order (heun) call the model more often; events.Step counts what they do.
    """
    steps = request.num_inference_steps
    if request.edit is None or _edit_is_first_frame(request):
        return steps
    if request.edit.strength == 0:
        return 0
    if card.family in ROUNDED_DOWN:
        return min(steps, int(steps * request.edit.strength))
    return steps - int(steps - steps * request.edit.strength)


def _edit_is_first_frame(request: ResolvedRequest) -> bool:
    return request.video is not None and not request.video.framewise


def _check_strength(request: ResolvedRequest, card: ModelCard) -> None:
    """diffusers would fail later with "the number of steps is < 1"; strength 0 is the picture itself."""
    if request.edit is None or request.edit.strength == 0 or denoising_steps(request, card) >= 1:
        return
    steps = request.num_inference_steps
    raise BadRequest(
        f"strength {request.edit.strength} of {steps} steps leaves no step to run; "
        f"use strength 0 or at least {math.ceil(1000 / steps) / 1000}",
        param="strength",
    )


def _seed(request: GenerationRequest, fresh_seed: int) -> int:
    seed = fresh_seed if request.seed is None else request.seed
    if seed + request.num_images - 1 > MAX_SEED:
        raise BadRequest(f"seed must be at most {MAX_SEED} less the pictures after the first", param="seed")
    return seed


def _refiner(request: GenerationRequest, card: ModelCard, steps: int) -> float | None:
    """The part of the steps at which the refiner takes over; None: no refiner runs."""
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


def _steps(request: GenerationRequest, card: ModelCard, adjustments: list[Adjustment]) -> int:
    requested, steps = request.num_inference_steps, card.steps
    if requested is None:
        return steps.default
    if steps.min <= requested <= steps.max:
        return requested
    if not card.corrects:
        raise BadRequest(
            f"num_inference_steps is {requested}; {card.id} runs {steps.min}-{steps.max}",
            param="num_inference_steps",
        )
    used = max(steps.min, min(steps.max, requested))
    name = (card.family or card.name).upper()
    rule = f"exactly {used}" if steps.min == steps.max else f"{steps.min} to {steps.max}"
    adjustments.append(
        Adjustment(
            "steps_corrected",
            "num_inference_steps",
            f"{name} requires {rule} steps. Overriding {requested} -> {used}",
        )
    )
    return used


def _guidance(request: GenerationRequest, card: ModelCard, adjustments: list[Adjustment]) -> float:
    requested, guidance = request.guidance_scale, card.guidance
    if requested is None:
        return guidance.default
    if guidance.min <= requested <= guidance.max:
        return requested
    if not card.corrects:
        raise BadRequest(
            f"guidance_scale is {requested:g}; {card.id} takes {guidance.min:g}-{guidance.max:g}",
            param="guidance_scale",
        )
    used = max(guidance.min, min(guidance.max, requested))
    adjustments.append(
        Adjustment(
            "guidance_corrected",
            "guidance_scale",
            f"{card.id} was trained for guidance_scale {used:g}. Overriding {requested:g} -> {used:g}",
        )
    )
    return used


def _exactness(request: GenerationRequest, card: ModelCard, adjustments: list[Adjustment]) -> Exactness:
    requested, served = request.exact, card.serving.exact
    if requested is None or requested == served:
        return served
    if served != "off":
        return requested
    if requested == "strict":
        raise BadRequest(
            f"{card.id} proves no batch sizes (exact: off in its card), so it cannot promise exact results; "
            "leave exact out, or use a model whose exact is prefer or strict",
            param="exact",
        )
    adjustments.append(
        Adjustment(
            "exact_corrected", "exact", f"{card.id} proves no batch sizes. Overriding {requested} -> off"
        )
    )
    return served


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
    requested, used = request.max_sequence_length, card.max_sequence_length
    if requested is None or requested == used:
        return used
    if used is None:
        raise BadRequest(f"{card.id} has no max_sequence_length; leave it out", param="max_sequence_length")
    if not card.corrects and requested > used:
        raise BadRequest(
            f"max_sequence_length is {requested}; {card.id} takes {used}", param="max_sequence_length"
        )
    adjustments.append(
        Adjustment(
            "sequence_length_corrected",
            "max_sequence_length",
            f"{card.id} runs with {used} text tokens. Overriding {requested} -> {used}",
        )
    )
    return used


def _edit(request: GenerationRequest, card: ModelCard, result: ImageSize | None) -> ResolvedEdit | None:
    """The edit with its strength and the size of the finished picture, if that is not the request's."""
    edit = request.edit
    if edit is None:
        return None
    strength = edit.strength
    if strength is None:
        strength = card.strength if edit.has_pixels else 1.0
    if request.video is not None and card.videos is not None and not card.videos.framewise:
        strength = 1.0
    facts = {name: getattr(edit, name) for name in Edit.model_fields} | {"strength": strength}
    if result is None:
        return ResolvedEdit(**facts)
    return ResolvedEdit(**facts, result_width=result.width, result_height=result.height)
