"""From A1111's bodies to requests: one for every job of a call."""

from __future__ import annotations

import asyncio
import io
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import ImageOps
from pydantic import ValidationError

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import (
    SEEDS,
    Control,
    Edit,
    FitMode,
    GenerationRequest,
    OutputOptions,
    Task,
)
from deployments.sandbox.decoder import DecodeMode, decoder_pool
from deployments.validation.image_header import read_image_header
from serve_app.api.a1111 import samplers
from serve_app.api.a1111.controls import read_units
from serve_app.api.a1111.memory import DEFAULTS
from serve_app.api.a1111.prompts import plain_prompt
from serve_app.api.a1111.schemas import MAX_IMAGES, GenerationBody, ImageToImageBody
from serve_app.api.prepared import PreparedRequest
from serve_app.api.validation_messages import bad_request
from serve_app.jobs.store.cache_keys import body_digest

PREVIEWS = 4  # of each job, for current_image of /progress
FITS: Sequence[FitMode] = ("stretch", "crop", "pad", "stretch")  # by resize_mode
ORIGINAL = 1  # of inpainting_fill: what is under the mask is what the new area begins with
CHECKPOINT = "sd_model_checkpoint"
OVERRIDES = (CHECKPOINT, "sd_model_hash", "sd_vae", "samples_format", "save_images_add_number")


@dataclass(frozen=True, slots=True)
class A1111Inputs:
    """What of a body needs no model to be read."""

    controls: tuple[Control, ...]
    edit: Edit | None
    notices: tuple[Adjustment, ...]

    @property
    def task(self) -> Task:
        if self.edit is None:
            return Task.t2i
        return Task.inpaint if self.edit.is_masked else Task.i2i


async def read_inputs(body: GenerationBody) -> A1111Inputs:
    """The images of a body. Raises BadRequest."""
    if body.script_name:
        raise BadRequest(
            f"the script {body.script_name!r} is not run here; leave script_name out", param="script_name"
        )
    if body.n_iter * body.batch_size > MAX_IMAGES:
        raise BadRequest(
            f"n_iter x batch_size is {body.n_iter * body.batch_size}; one call makes at most {MAX_IMAGES}",
            param="n_iter",
        )
    controls, notices = read_units(body.alwayson_scripts)
    edit = await _edit(body) if isinstance(body, ImageToImageBody) else None
    return A1111Inputs(controls, edit, (*notices, *_ignored(body)))


def prepare(body: GenerationBody, inputs: A1111Inputs, card: ModelCard, kind: str) -> list[PreparedRequest]:
    """One request for every job: each makes as many images as the card allows, seeds count up over all.

    kind: of the body, for its digest. Raises BadRequest.
    """
    total = body.n_iter * body.batch_size
    first = secrets.randbelow(SEEDS) if body.seed is None else body.seed
    digest = body_digest(body, kind=kind)
    try:
        whole, notices = _request(body, inputs, card, first)
        prepared = []
        for start in range(0, total, card.max_images):
            part = {"num_images": min(card.max_images, total - start), "seed": first + start}
            prepared.append(PreparedRequest(whole.model_copy(update=part), digest, notices))
    except ValidationError as error:
        raise bad_request(error, GenerationRequest) from None
    return prepared


def _request(
    body: GenerationBody, inputs: A1111Inputs, card: ModelCard, seed: int
) -> tuple[GenerationRequest, tuple[Adjustment, ...]]:
    prompt, of_prompt = plain_prompt(body.prompt, "prompt")
    negative, of_negative = plain_prompt(body.negative_prompt, "negative_prompt")
    scheduler, of_sampler = samplers.choose(body.sampler_name or body.sampler_index, body.scheduler, card)
    refiner, of_refiner = _refiner(body, card, inputs.task)
    request = GenerationRequest(
        model=card.id,
        prompt=prompt,
        negative_prompt=negative,
        width=body.width,
        height=body.height,
        num_inference_steps=body.steps,
        guidance_scale=body.cfg_scale,
        seed=seed,
        scheduler=scheduler,
        edit=inputs.edit,
        controls=inputs.controls,
        fit=FITS[body.resize_mode] if isinstance(body, ImageToImageBody) else "crop",
        refiner=refiner,
        output=OutputOptions(previews=PREVIEWS),
    )
    return request, (*inputs.notices, *of_prompt, *of_negative, *of_sampler, *of_refiner)


def _refiner(
    body: GenerationBody, card: ModelCard, task: Task
) -> tuple[float | None, tuple[Adjustment, ...]]:
    """Where the model's refiner takes over; None with a warning where it has none."""
    asked, at = body.refiner_checkpoint, body.refiner_switch_at
    if not asked or asked == "None" or at is None or not 0 < at < 1:
        return None, ()
    if card.refiner is not None and task is Task.t2i:
        return at, ()
    message = f"{card.id} has no refiner for this; refiner_checkpoint {asked!r} has no effect"
    return None, (Adjustment("refiner_ignored", "refiner_checkpoint", message),)


async def _edit(body: ImageToImageBody) -> Edit:
    """The image to start from, with its mask. Raises BadRequest."""
    if not body.init_images:
        raise BadRequest("init_images is missing; send the image to start from", param="init_images")
    start: dict[str, Any] = {"image": body.init_images[0], "strength": body.denoising_strength}
    if body.mask is None:
        return Edit(**start)
    mask = await asyncio.to_thread(_inverted, body.mask) if body.inpainting_mask_invert else body.mask
    return Edit(
        **start,
        mask_image=mask,
        feather=body.mask_blur,
        only_masked=body.inpaint_full_res,
        only_masked_padding=body.inpaint_full_res_padding,
    )


def _inverted(mask: bytes) -> bytes:
    """The mask with black for white, as a PNG file. Raises BadRequest."""
    header = read_image_header(mask, "mask")
    picture = decoder_pool().decode(mask, DecodeMode.mask, "mask", header.orientation)
    file = io.BytesIO()
    ImageOps.invert(picture).save(file, "PNG")
    return file.getvalue()


def _ignored(body: GenerationBody) -> tuple[Adjustment, ...]:
    """Warnings of what would change the image in A1111 and has no effect here."""
    fill = body.inpainting_fill if isinstance(body, ImageToImageBody) and body.mask else ORIGINAL
    found = {
        "styles": f"styles {body.styles} are not known here" if any(body.styles) else "",
        "subseed_strength": "variations of a seed are not made here" if body.subseed_strength else "",
        "restore_faces": "faces are not restored here" if body.restore_faces else "",
        "tiling": "tiling images are not made here" if body.tiling else "",
        "inpainting_fill": (
            f"inpainting_fill {fill} is read as {ORIGINAL} (original)" if fill != ORIGINAL else ""
        ),
    }
    others = sorted(
        name
        for name, value in body.override_settings.items()
        if name not in OVERRIDES and value and value != DEFAULTS.get(name)
    )
    found["override_settings"] = f"{', '.join(others)[:200]} cannot be set here" if others else ""
    return tuple(
        Adjustment(f"{name}_ignored", name, f"{message}; it has no effect")
        for name, message in found.items()
        if message
    )
