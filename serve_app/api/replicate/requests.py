"""From a prediction's input to a request (pure)."""

from __future__ import annotations

import math
from typing import cast

from pydantic import ValidationError

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.card import ModelCard
from deployments.protocol.request import Edit, GenerationRequest, OutputOptions, PictureFormat
from serve_app.api.a1111 import samplers
from serve_app.api.prepared import PreparedRequest
from serve_app.api.replicate.schemas import PredictionBody, PredictionInput
from serve_app.api.validation_messages import bad_request
from serve_app.jobs.store.cache_keys import body_digest

COMPLETED = "completed"  # the one event of webhook_events_filter that webhooks are sent for
WITHOUT_EFFECT = (  # inputs that cannot change the image here, or only its speed
    "go_fast",
    "disable_safety_checker",
    "safety_tolerance",
    "apply_watermark",
    "megapixels",
)


def prepare(body: PredictionBody, card: ModelCard, model: str) -> PreparedRequest:
    """The request of a prediction. model: as the call names it. Raises BadRequest."""
    asked = body.input
    width, height = _size(asked, card)
    scheduler, notices = samplers.choose(asked.scheduler, None, card)
    file_format = "jpeg" if asked.output_format in ("jpg", "jpeg") else asked.output_format or "png"
    try:
        request = GenerationRequest(
            model=card.id,
            prompt=asked.prompt,
            negative_prompt=asked.negative_prompt,
            width=width,
            height=height,
            num_inference_steps=asked.num_inference_steps,
            guidance_scale=asked.guidance_scale,
            seed=asked.seed,
            num_images=asked.num_outputs,
            scheduler=scheduler,
            edit=_edit(asked),
            output=OutputOptions(
                format=cast(PictureFormat, file_format), quality=max(1, asked.output_quality)
            ),
        )
    except ValidationError as error:
        raise bad_request(error, GenerationRequest) from None
    webhook, of_webhook = _webhook(body)
    notices = (*notices, *_unknown(asked), *of_webhook)
    digest = body_digest(body, kind="replicate prediction", model=model)
    return PreparedRequest(request, digest, notices, webhook)


def _edit(asked: PredictionInput) -> Edit | None:
    if asked.image is None:
        return None
    return Edit(image=asked.image, mask_image=asked.mask, strength=asked.prompt_strength)


def _size(asked: PredictionInput, card: ModelCard) -> tuple[int | None, int | None]:
    """Pixels: as given, or of this aspect ratio with about as many as the card's default."""
    ratio = asked.aspect_ratio
    if asked.width or asked.height or ratio is None or ":" not in ratio:
        return asked.width, asked.height
    across, down = (max(1, int(side)) for side in ratio.split(":"))
    scale = math.sqrt(card.sizes.width * card.sizes.height / (across * down))
    return max(1, round(across * scale)), max(1, round(down * scale))


def _unknown(asked: PredictionInput) -> tuple[Adjustment, ...]:
    names = sorted(set(asked.model_extra or {}) - set(WITHOUT_EFFECT))
    return tuple(
        Adjustment("input_ignored", name[:100], f"input {name[:100]} is not known here; it has no effect")
        for name in names[:20]
    )


def _webhook(body: PredictionBody) -> tuple[str | None, tuple[Adjustment, ...]]:
    """The address to call at the end, and a warning where other calls were asked for."""
    events = body.webhook_events_filter
    if body.webhook is None or events is None or set(events) <= {COMPLETED}:
        return body.webhook, ()
    message = f"webhooks are sent for {COMPLETED} only, not for {', '.join(sorted(set(events)))[:100]}"
    notice = Adjustment("webhook_events_ignored", "webhook_events_filter", message)
    return (body.webhook if COMPLETED in events else None), (notice,)
