"""Arguments of the tools, and the requests that they mean."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from deployments.protocol.request import Edit, GenerationRequest, Task, Video
from serve_app.api.schemas.files import ImageBytes


class ToolArguments(BaseModel):
    """What a tool is called with; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class ListArguments(ToolArguments):
    """None."""


class JobArguments(ToolArguments):
    job_id: str = Field(description="32 hex digits, as the other tools return them.")


class PromptArguments(ToolArguments):
    """What all generating tools take."""

    prompt: str = Field(description="What to generate, in words; may hold <lora:name:weight>.")
    negative_prompt: str = Field("", description="What to avoid, for models that take it.")
    model: str | None = Field(None, description="An id that list_models returns; without it the default.")
    seed: int | None = Field(None, ge=0, description="The same seed makes the same image again.")
    steps: int | None = Field(None, ge=1, le=1000, description="Denoising steps; the model has a default.")
    guidance: float | None = Field(None, ge=0, le=100, description="How closely to follow the prompt.")

    def request(self, model: str) -> GenerationRequest:
        """Raises pydantic's ValidationError."""
        return GenerationRequest(
            model=model,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            seed=self.seed,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
        )

    def tasks(self) -> tuple[Task, ...]:
        """What the model has to be able to do: the first of these that any can."""
        return (Task.t2i,)


class ImageArguments(PromptArguments):
    width: int | None = Field(None, ge=1, le=16_384, description="Pixels.")
    height: int | None = Field(None, ge=1, le=16_384, description="Pixels.")
    num_images: int = Field(1, ge=1, le=16)

    def request(self, model: str) -> GenerationRequest:
        size = {"width": self.width, "height": self.height, "num_images": self.num_images}
        return super().request(model).model_copy(update=size)


class EditArguments(PromptArguments):
    image: ImageBytes = Field(repr=False, description="A PNG, JPEG or WebP file as base64 or a data URL.")
    mask: ImageBytes | None = Field(None, repr=False, description="White is generated anew; the rest stays.")
    strength: float | None = Field(
        None, ge=0, le=1, description="0 keeps the image, 1 replaces it; for models that start from it."
    )

    def request(self, model: str) -> GenerationRequest:
        start = Edit(image=self.image, mask_image=self.mask, strength=self.strength)
        return super().request(model).model_copy(update={"edit": start})

    def by_reference(self, model: str) -> GenerationRequest:
        """For a model that follows an instruction about the image."""
        return super().request(model).model_copy(update={"references": (self.image,)})

    def tasks(self) -> tuple[Task, ...]:
        return (Task.edit, Task.i2i) if self.mask is None else (Task.inpaint,)


class VideoArguments(PromptArguments):
    seconds: float | None = Field(None, gt=0, le=600)
    width: int | None = Field(None, ge=1, le=16_384, description="Pixels.")
    height: int | None = Field(None, ge=1, le=16_384, description="Pixels.")
    image: ImageBytes | None = Field(None, repr=False, description="The first frame.")

    def request(self, model: str) -> GenerationRequest:
        update = {
            "video": Video(seconds=self.seconds),
            "edit": None if self.image is None else Edit(image=self.image),
            "width": self.width,
            "height": self.height,
        }
        return super().request(model).model_copy(update=update)

    def tasks(self) -> tuple[Task, ...]:
        return (Task.t2v,) if self.image is None else (Task.i2v,)
