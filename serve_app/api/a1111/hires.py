"""A1111's "hires fix": a finished image is enlarged, and its details are drawn anew."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.card import ModelCard
from deployments.protocol.request import Edit, Task
from serve_app.api.a1111.pictures import SCALED, UPSCALERS, enlarged, resized
from serve_app.api.a1111.requests import A1111Inputs, prepare
from serve_app.api.a1111.schemas import TextToImageBody
from serve_app.api.caller import CallerContext
from serve_app.api.prepared import PreparedRequest
from serve_app.jobs.job import Job

DEFAULT_STRENGTH = 0.7  # A1111's own, of the second pass


async def second_pass(
    caller: CallerContext, body: TextToImageBody, card: ModelCard, jobs: Sequence[Job]
) -> list[PreparedRequest]:
    """One request for each finished image: it begins with the enlarged image. Empty for a model that cannot
    start from an image; see `cannot`."""
    if Task.i2i not in card.tasks:
        return []
    prepared = []
    for job in jobs:
        for artifact in job.artifacts:
            if artifact.kind != "image":
                continue
            _, image = await caller.job_service.artifact(job.id, caller.owner, artifact.index, "image")
            large = await asyncio.to_thread(_large, body, image)
            prepared.append(_again(body, card, large, artifact.seed))
    return prepared


def cannot(body: TextToImageBody, card: ModelCard) -> tuple[Adjustment, ...]:
    """A warning where the second pass is left out."""
    if not body.enable_hr or Task.i2i in card.tasks:
        return ()
    message = f"{card.id} cannot start from an image, so the second pass of hires fix was left out"
    return (Adjustment("hires_skipped", "enable_hr", message),)


def _again(body: TextToImageBody, card: ModelCard, image: bytes, seed: int) -> PreparedRequest:
    strength = DEFAULT_STRENGTH if body.denoising_strength is None else body.denoising_strength
    once = body.model_copy(
        update={
            "n_iter": 1,
            "batch_size": 1,
            "seed": seed,
            "width": None,  # that of the enlarged image, as near as the model allows
            "height": None,
            "steps": body.hr_second_pass_steps or body.steps,
        }
    )
    inputs = A1111Inputs((), Edit(image=image, strength=strength), ())
    (request,) = prepare(once, inputs, card, "a1111 hires")
    if body.hr_upscaler is None or body.hr_upscaler.lower() == SCALED:
        return request
    message = f"hr_upscaler {body.hr_upscaler!r} is not here; {UPSCALERS[1]} enlarged the image"
    notice = Adjustment("upscaler_replaced", "hr_upscaler", message)
    return replace(request, notices=(*request.notices, notice))


def _large(body: TextToImageBody, image: bytes) -> bytes:
    if body.hr_resize_x and body.hr_resize_y:
        return resized(image, "hr_resize_x", (body.hr_resize_x, body.hr_resize_y), crop=True)
    return enlarged(image, "hr_scale", body.hr_scale)
