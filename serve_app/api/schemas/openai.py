"""The OpenAI dialect of /v1/images/generations and /v1/models."""

import re
from typing import Literal

from pydantic import BaseModel, Field

from deployments.protocol.errors import BadRequest
from deployments.protocol.request import GenerationRequest, OutputOptions, PictureFormat
from serve_app.api.schemas.job import WarningOut
from serve_app.api.schemas.lora import LoraFields

SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


def pixels(size: str | None, width: int | None, height: int | None) -> tuple[int | None, int | None]:
    """Width and height, said in one of both ways; None: the model's default. Raises BadRequest."""
    if size is None or size == "auto":
        return width, height
    match = SIZE.fullmatch(size)
    if match is None:
        raise BadRequest("size must be 'auto' or width x height, such as '256x256'", param="size")
    both = int(match[1]), int(match[2])
    if (width or both[0], height or both[1]) != both:
        raise BadRequest("size says one thing, width and height another; send one of them", param="size")
    return both


class OpenAIImageBody(LoraFields):
    """OpenAI's fields, and after them those that vLLM-Omni and SGLang added under these names."""

    prompt: str = Field(examples=["a red fox in the snow"])
    model: str | None = None
    n: int | None = Field(None, ge=1, le=10, description="Pictures.")
    size: str | None = Field(None, description="'auto', or width x height such as '256x256'.")
    response_format: Literal["url", "b64_json"] | None = Field(
        None, description="b64_json unless told otherwise; a url needs the same key."
    )
    output_format: PictureFormat | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="JPEG and WebP quality.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="Rough looks at the unfinished picture; needs stream."
    )
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures are opaque.")
    # Taken and ignored: no model here has such a choice.
    quality: str | None = None
    style: str | None = None
    moderation: str | None = None
    user: str | None = None
    safety_identifier: str | None = None

    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    scheduler: str | None = None
    max_sequence_length: int | None = None

    def to_request(self, model: str) -> GenerationRequest:
        """The same wish, dialect-free. Raises BadRequest, or pydantic's ValidationError past hard bounds."""
        if self.partial_images and not self.stream:
            raise BadRequest("partial_images needs stream: true", param="partial_images")
        if self.stream and self.response_format == "url":
            raise BadRequest(
                "a stream carries b64_json only; leave response_format out", param="response_format"
            )
        width, height = pixels(self.size, self.width, self.height)
        quality = 95 if self.output_compression is None else max(1, self.output_compression)
        return GenerationRequest(
            model=model,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt or "",
            width=width,
            height=height,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            seed=self.seed,
            num_images=self.n or 1,
            scheduler=self.scheduler or "auto",
            max_sequence_length=self.max_sequence_length,
            output=OutputOptions(
                format=self.output_format or "png", quality=quality, previews=self.partial_images or 0
            ),
        )


class ImageData(BaseModel):
    """One picture; `seed` is ours."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class ImagesResponse(BaseModel):
    """OpenAI's answer; `id`, `model`, `seed`, `warnings` and `generation_s` are ours."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: PictureFormat
    size: str
    id: str = Field(description="The job, also under /api/generate/{id}.")
    model: str
    seed: int
    warnings: list[WarningOut]
    generation_s: float | None


class TokenDetails(BaseModel):
    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """Nothing is metered in tokens here; clients of OpenAI's stream expect the fields."""

    input_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int = 0
    total_tokens: int = 0


class PartialImage(BaseModel):
    """A rough look at the unfinished picture."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    b64_json: str
    partial_image_index: int
    created_at: int
    output_format: str
    size: str = Field(description="Of the picture to come.")
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"


class CompletedImage(BaseModel):
    """One finished picture; `id`, `model` and `seed` are ours."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    b64_json: str
    created_at: int
    output_format: PictureFormat
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    usage: Usage = Usage()
    id: str
    model: str
    seed: int


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str


class ModelEntries(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]
