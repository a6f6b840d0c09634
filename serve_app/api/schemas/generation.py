"""Field groups of the bodies that generate something: each field is declared once."""

import re
from typing import Any

from pydantic import AliasChoices, ConfigDict, Field

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import MAX_PREVIEWS, Exactness, GenerationRequest
from serve_app.admission.foreign_values import fit_values
from serve_app.api.schemas.foreign_fields import ignored_fields, refuse_pictures, unnested
from serve_app.api.schemas.lora_fields import LoraFields
from serve_app.api.schemas.numbers import Int, Seed
from serve_app.api.schemas.sampler_names import SchedulerName

SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


class GenerationFields(LoraFields):
    """The fields that all dialects take under the same names."""

    prompt: str = Field(description="What to generate.", examples=["a red fox in the snow"])
    model: str | None = Field(None, description="Id or alias; without it a model that is ready.")
    width: Int | None = Field(None, description="Pixels.", examples=[64])
    height: Int | None = Field(None, description="Pixels.", examples=[64])
    num_inference_steps: Int | None = Field(None, description="Denoising steps.", examples=[4])
    guidance_scale: float | None = Field(None, description="How closely to follow the prompt.")
    seed: Seed = Field(
        None,
        description="0 to 2^63-1, as a number or as text; -1, random or none: a random one.",
        examples=[7],
    )
    exact: Exactness | None = Field(
        None,
        description="strict: no bit depends on other requests. prefer: none where that is proven, and a "
        "warning where not. off: no promise. Without it the model's own choice.",
    )

    def shared_arguments(self) -> dict[str, Any]:
        """The fields that GenerationRequest has under the same names."""
        return self.model_dump(include={"prompt", "num_inference_steps", "guidance_scale", "seed", "exact"})


class NativeFields(GenerationFields):
    """The fields that the native bodies for images and for videos share."""

    negative_prompt: str = Field("", description="What to avoid, for models that take it.")
    num_inference_steps: Int | None = Field(
        None,
        validation_alias=AliasChoices("num_inference_steps", "steps"),
        description="Denoising steps; `steps` is another name for it.",
        examples=[4],
    )
    guidance_scale: float | None = Field(
        None,
        validation_alias=AliasChoices("guidance_scale", "cfg_scale"),
        description="How closely to follow the prompt; `cfg_scale` is another name for it.",
    )
    scheduler: SchedulerName = Field(
        "auto",
        validation_alias=AliasChoices("scheduler", "sampler", "sampler_name"),
        description="Noise scheduler, where the model offers a choice; `sampler` and `sampler_name` are "
        "other names for it, and `Euler a` for `euler_a`.",
    )
    max_sequence_length: Int | None = Field(None, description="Text tokens.")
    previews: Int = Field(
        0, ge=0, le=MAX_PREVIEWS, description="Preview images during denoising, sent as events."
    )
    webhook_url: str | None = Field(
        None,
        max_length=2048,
        repr=False,
        description="An https URL that is called when the job has ended, signed per Standard Webhooks.",
    )

    @property
    def webhook(self) -> str | None:
        return self.webhook_url

    def shared_arguments(self) -> dict[str, Any]:
        own = {"width", "height", "negative_prompt", "scheduler", "max_sequence_length"}
        return super().shared_arguments() | self.model_dump(include=own)


class OpenAIFields(GenerationFields):
    """The fields that OpenAI's bodies for images and for videos share, with the additions of vLLM-Omni,
    SGLang and clients. Others are ignored with a warning, values that a card does not allow are corrected."""

    model_config = ConfigDict(extra="allow")

    num_inference_steps: Int | None = Field(
        None,
        validation_alias=AliasChoices("num_inference_steps", "steps", "num_steps"),
        description="Denoising steps.",
    )
    guidance_scale: float | None = Field(
        None,
        validation_alias=AliasChoices("guidance_scale", "cfg_scale", "guidance", "cfg"),
        description="How closely to follow the prompt.",
    )
    aspect_ratio: str | None = Field(None, description="Such as '16:9', where there is no size.")
    size: str | None = Field(None, description="'auto', or width x height such as '256x256'.")
    negative_prompt: str | None = Field(None, description="What to avoid, for models that take it.")
    user: str | None = Field(None, description="Accepted and ignored.")

    @classmethod
    def prepared(cls, values: dict[str, Any]) -> dict[str, Any]:
        """With the fields of nested objects, such as extra_body, beside them."""
        return unnested(values)

    @property
    def notices(self) -> tuple[Adjustment, ...]:
        """What was sent and is not known."""
        return (*super().notices, *ignored_fields(self.model_extra or {}))

    def fitted(
        self, request: GenerationRequest, card: ModelCard
    ) -> tuple[GenerationRequest, tuple[Adjustment, ...]]:
        """With values that the card allows."""
        return fit_values(request, card, aspect_ratio=self.aspect_ratio)

    def shared_arguments(self) -> dict[str, Any]:
        """Raises BadRequest for a size that cannot be read or that contradicts width and height, and for a
        picture that this call does not take."""
        refuse_pictures(self.model_extra or {})
        width, height = resolve_size(self.size, self.width, self.height)
        own = {"width": width, "height": height, "negative_prompt": self.negative_prompt or ""}
        return super().shared_arguments() | own


def resolve_size(size: str | None, width: int | None, height: int | None) -> tuple[int | None, int | None]:
    """Width and height in pixels, from `size` or from the two fields; None: the model's default.

    Raises BadRequest when `size` cannot be read, or contradicts width and height.
    """
    if size is None or size == "auto":
        return width, height
    match = SIZE.fullmatch(size)
    if match is None:
        raise BadRequest("size must be 'auto' or width x height, such as '256x256'", param="size")
    both = int(match[1]), int(match[2])
    if (width or both[0], height or both[1]) != both:
        raise BadRequest("size says one thing, width and height another; send one of them", param="size")
    return both
