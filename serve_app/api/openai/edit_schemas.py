"""Body of POST /v1/images/edits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import AliasChoices, Field

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import MAX_REFERENCES, ControlType, Edit, GenerationRequest, Task
from serve_app.api.openai.image_schemas import OpenAIImageBody
from serve_app.api.schemas.files import ImageBytes, ImageList
from serve_app.loras.spec import LoraSpec

EDIT_FILES = ("image", "mask")


class OpenAIEditBody(OpenAIImageBody):
    """OpenAI's fields for an edit, with the additions of /v1/images/generations."""

    kind = "openai edit"

    image: ImageList = Field(
        [],
        max_length=MAX_REFERENCES,
        repr=False,
        validation_alias=AliasChoices("image", "image[]"),
        description="The image to edit, or several that `prompt` refers to: parts named `image` or `image[]` "
        "of a form; base64 or data URLs in JSON.",
    )
    mask: ImageBytes | None = Field(
        None, repr=False, description="Transparent where the first image is to change; it is inpainted there."
    )
    strength: float | None = Field(
        None, ge=0, le=1, description="For models that start from the image: 0 keeps it, 1 replaces it."
    )
    input_fidelity: Literal["high", "low"] | None = Field(
        None, description="Accepted, with a warning: no model here has such a choice."
    )


@dataclass(frozen=True, slots=True)
class EditSubmission:
    """An edit as a job of one model: inpainted with a mask; without one by reference, or image to image where
    the model takes no reference images."""

    body: OpenAIEditBody
    card: ModelCard
    task: Task
    aliased: tuple[Adjustment, ...] = ()  # that the card's model was asked for by another name
    control_types: set[ControlType] = field(default_factory=set)
    uses_refiner: bool = False
    webhook: str | None = None

    @property
    def model(self) -> str | None:
        return self.card.id

    @property
    def notices(self) -> tuple[Adjustment, ...]:
        """That the model has another name, does something else than an edit by reference, or has no choice
        of how closely the image is followed."""
        known = (*self.aliased, *self.body.notices, *self._ignored_fidelity())
        if self.task is not Task.i2i:
            return known
        strength = self.card.strength if self.body.strength is None else self.body.strength
        message = (
            f"{self.card.id} takes no reference images; the image is where it begins instead, changed by "
            f"strength {strength:g} (0 keeps it, 1 replaces it)"
        )
        return (*known, Adjustment("edit_by_strength", "image", message))

    def _ignored_fidelity(self) -> tuple[Adjustment, ...]:
        asked = self.body.input_fidelity
        if asked is None:
            return ()
        cure = "strength chooses how much of it is kept" if self.task is Task.i2i else "leave it out"
        message = f"input_fidelity {asked} has no effect: {self.card.id} has no such choice; {cure}"
        return (Adjustment("input_fidelity_ignored", "input_fidelity", message),)

    def fitted(
        self, request: GenerationRequest, card: ModelCard
    ) -> tuple[GenerationRequest, tuple[Adjustment, ...]]:
        return self.body.fitted(request, card)

    def lora_specs(self) -> tuple[LoraSpec, ...]:
        return self.body.lora_specs()

    def digest(self) -> str:
        return self.body.digest()

    def to_request(self, model: str) -> GenerationRequest:
        """The same request without its dialect. Raises BadRequest, or pydantic's ValidationError."""
        request, body = self.body.to_request(model), self.body
        if not body.image:
            raise BadRequest("image is missing; send the image to edit", param="image")
        if self.task is Task.edit:
            if body.strength is not None:
                raise BadRequest(
                    f"{model} edits by reference images, which have no strength; leave it out",
                    param="strength",
                )
            return request.model_copy(update={"references": tuple(body.image)})
        if len(body.image) > 1:
            use = "inpaints one image" if self.task is Task.inpaint else "takes one image to start from"
            raise BadRequest(
                f"there are {len(body.image)} images; {model} {use}: send one, or leave the mask out and use "
                "a model with the task edit",
                param="image",
            )
        start = Edit(
            image=body.image[0],
            mask_image=body.mask,
            mask_channel="luminance" if body.mask is None else "alpha",
            strength=body.strength,
        )
        return request.model_copy(update={"edit": start})


def edit_task(body: OpenAIEditBody, card: ModelCard) -> Task:
    """What this model does with the body."""
    if body.mask is not None:
        return Task.inpaint
    return Task.i2i if Task.edit not in card.tasks and Task.i2i in card.tasks else Task.edit
