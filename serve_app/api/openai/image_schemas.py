"""Body, answer and stream events of POST /v1/images/generations."""

from typing import Literal

from pydantic import AliasChoices, BaseModel, Field

from deployments.protocol.errors import BadRequest
from deployments.protocol.request import GenerationRequest, OutputOptions, PictureFormat, Task
from serve_app.api.schemas.generation import OpenAIFields
from serve_app.api.schemas.job import WarningOut
from serve_app.api.schemas.numbers import Int
from serve_app.api.schemas.sampler_names import SchedulerName

URL_MODELS = "dall-e"  # beginning of the names whose default is a link


class OpenAIImageBody(OpenAIFields):
    """OpenAI's fields, and those that vLLM-Omni and SGLang added."""

    kind = "openai image"

    n: Int | None = Field(
        None,
        ge=1,
        le=10,
        validation_alias=AliasChoices("n", "num_images", "num_outputs_per_prompt"),
        description="Number of images.",
    )
    response_format: Literal["url", "b64_json"] | None = Field(
        None, description="b64_json by default, of names like dall-e-3 url; a url needs the same key."
    )
    output_format: PictureFormat | None = None
    output_compression: Int | None = Field(None, ge=0, le=100, description="JPEG and WebP quality.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: Int | None = Field(
        None, ge=0, le=3, description="Preview images during denoising; needs stream."
    )
    background: Literal["auto", "opaque"] | None = Field(None, description="Images are always opaque.")
    scheduler: SchedulerName | None = Field(
        None,
        validation_alias=AliasChoices("scheduler", "sampler", "sampler_name"),
        description="Noise scheduler, where the model offers a choice.",
    )
    max_sequence_length: Int | None = Field(None, description="Text tokens.")
    # Accepted and ignored: no model here has such a choice.
    quality: str | None = None
    style: str | None = None
    moderation: str | None = None
    safety_identifier: str | None = None

    @property
    def task(self) -> Task:
        return Task.t2i

    @property
    def wants_url(self) -> bool:
        """Whether the answer has links: clients of DALL-E expect them unless they ask for something else."""
        default = "url" if (self.model or "").startswith(URL_MODELS) else "b64_json"
        return (self.response_format or default) == "url"

    def to_request(self, model: str) -> GenerationRequest:
        """The same request without its dialect. Raises BadRequest, or pydantic's ValidationError."""
        if self.partial_images and not self.stream:
            raise BadRequest("partial_images needs stream: true", param="partial_images")
        if self.stream and self.response_format == "url":
            raise BadRequest(
                "a stream carries b64_json only; leave response_format out", param="response_format"
            )
        quality = 95 if self.output_compression is None else max(1, self.output_compression)
        return GenerationRequest(
            model=model,
            **self.shared_arguments(),
            num_images=self.n or 1,
            scheduler=self.scheduler or "auto",
            max_sequence_length=self.max_sequence_length,
            output=OutputOptions(
                format=self.output_format or "png", quality=quality, previews=self.partial_images or 0
            ),
        )


class ImageData(BaseModel):
    """One image; `seed` is Weft's addition."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class ImagesResponse(BaseModel):
    """OpenAI's answer; `id`, `model`, `seed`, `warnings` and `generation_s` are Weft's additions."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: PictureFormat
    size: str
    id: str = Field(description="Id of the job, readable under /api/generate/{id}.")
    model: str
    seed: int
    warnings: list[WarningOut]
    generation_s: float | None


class TokenDetails(BaseModel):
    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """Always zero: nothing is metered in tokens, but clients of OpenAI's stream expect the fields."""

    input_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int = 0
    total_tokens: int = 0


class PartialImage(BaseModel):
    """A preview of the unfinished image, in the format and the size that the finished one has."""

    type: str = Field(description="image_generation.partial_image; of an edit image_edit.partial_image.")
    b64_json: str
    partial_image_index: int
    created_at: int
    output_format: PictureFormat
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"


class CompletedImage(BaseModel):
    """One finished image; `id`, `model`, `seed` and `warnings` are Weft's additions."""

    type: str = Field(description="image_generation.completed; of an edit image_edit.completed.")
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
    warnings: list[WarningOut]
