"""The native wish for pictures: what POST /api/generate/image takes."""

import base64
import binascii
from typing import Annotated, Any

from pydantic import AliasChoices, BeforeValidator, Field, WithJsonSchema

from deployments.protocol.errors import BadRequest
from deployments.protocol.request import Edit, GenerationRequest, Output, PictureFormat, Strict, Task


def _picture_bytes(value: Any) -> Any:
    """The bytes of a picture sent as base64 or as a data URL; anything else is left to pydantic."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise ValueError("a data URL must read data:image/png;base64,<data>")
    elif "://" in text[:40]:
        raise ValueError("this service fetches no addresses; send the picture itself as base64 or as a file")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(
            "this is not base64; send a PNG, JPEG or WebP file as base64 or a data URL"
        ) from None


PictureBytes = Annotated[
    bytes,
    BeforeValidator(_picture_bytes),
    WithJsonSchema({"type": "string", "description": "PNG, JPEG or WebP: base64 or a data URL."}),
]


class ImageBody(Strict):
    """What shall be painted. Only `prompt` is needed; the model fills the rest.

    What a model allows stands in GET /api/models/; what it corrects comes back as a warning.
    """

    prompt: str = Field(description="What the picture shall show.", examples=["a red fox in the snow"])
    model: str | None = Field(None, description="Id or alias; without it a model that is ready.")
    negative_prompt: str = Field("", description="What it shall not show, where the model knows such.")
    width: int | None = Field(None, description="Pixels.", examples=[128])
    height: int | None = Field(None, description="Pixels.", examples=[128])
    num_inference_steps: int | None = Field(
        None,
        validation_alias=AliasChoices("num_inference_steps", "steps"),
        description="Denoising steps; `steps` is another name for it.",
        examples=[4],
    )
    guidance_scale: float | None = None
    seed: int | None = Field(None, description="0 to 2^63-1; without it a random one.", examples=[7])
    num_images: int = Field(1, description="Pictures; their seeds count up from `seed`.")
    scheduler: str = Field("auto", description="Noise scheduler, where the model offers a choice.")
    max_sequence_length: int | None = Field(None, description="Text tokens.")
    output_format: PictureFormat = "png"
    output_quality: int = Field(95, ge=1, le=100, description="JPEG and WebP only.")
    image: PictureBytes | None = Field(None, repr=False, description="A picture to start from.")
    mask_image: PictureBytes | None = Field(
        None, repr=False, description="White is painted anew, black is kept; needs `image`."
    )
    strength: float | None = Field(
        None, ge=0, le=1, description="0 keeps the picture, 1 replaces it; needs `image`."
    )

    @property
    def task(self) -> Task:
        if self.image is None:
            return Task.t2i
        return Task.i2i if self.mask_image is None else Task.inpaint

    def to_request(self, model: str) -> GenerationRequest:
        """The same wish, dialect-free. Raises BadRequest, or pydantic's ValidationError past hard bounds."""
        return GenerationRequest(
            model=model,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            width=self.width,
            height=self.height,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            seed=self.seed,
            num_images=self.num_images,
            scheduler=self.scheduler,
            max_sequence_length=self.max_sequence_length,
            edit=self._edit(),
            output=Output(format=self.output_format, quality=self.output_quality),
        )

    def _edit(self) -> Edit | None:
        if self.image is not None:
            return Edit(image=self.image, mask_image=self.mask_image, strength=self.strength)
        for name, value in (("mask_image", self.mask_image), ("strength", self.strength)):
            if value is not None:
                raise BadRequest(f"{name} needs a picture to start from; send image too", param=name)
        return None
