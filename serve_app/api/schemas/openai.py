"""The OpenAI dialect of /v1/images/generations and /v1/models."""

import re
from typing import Literal

from pydantic import BaseModel, Field

from deployments.protocol.errors import BadRequest
from deployments.protocol.request import GenerationRequest, Output, PictureFormat, Strict
from serve_app.api.schemas.job import Warned

SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


class GenerationsBody(Strict):
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
    stream: Literal[False] | None = Field(None, description="Streams are not served yet.")
    partial_images: Literal[0] | None = None
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
        width, height = self._size()
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
            output=Output(format=self.output_format or "png", quality=quality),
        )

    def _size(self) -> tuple[int | None, int | None]:
        if self.size is None or self.size == "auto":
            return self.width, self.height
        match = SIZE.fullmatch(self.size)
        if match is None:
            raise BadRequest("size must be 'auto' or width x height, such as '256x256'", param="size")
        size = int(match[1]), int(match[2])
        if (self.width or size[0], self.height or size[1]) != size:
            raise BadRequest("size says one thing, width and height another; send one of them", param="size")
        return size


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
    warnings: list[Warned]
    generation_s: float | None


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str


class ModelEntries(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]
