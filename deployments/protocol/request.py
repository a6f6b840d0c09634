"""What shall be generated: dialect-free, in diffusers' parameter names."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_SEED = 2**63 - 1
PictureFormat = Literal["png", "jpeg", "webp"]


class Strict(BaseModel):
    """Frozen, no unknown keys, no NaN, no silent conversions; bytes travel as base64 in JSON."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        ser_json_bytes="base64",
        val_json_bytes="base64",
        protected_namespaces=(),
    )


class Task(StrEnum):
    """What kind of work a request is; it picks the diffusers pipeline class."""

    t2i = "t2i"
    i2i = "i2i"
    inpaint = "inpaint"


class Edit(Strict):
    """A picture to start from. With a mask only its white part is painted anew."""

    image: bytes = Field(description="A PNG, JPEG or WebP file.", repr=False)
    mask_image: bytes | None = Field(
        None, description="A picture file; white is painted anew, black is kept.", repr=False
    )
    strength: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(
        None, description="0 keeps the picture, 1 replaces it. None: the card's default."
    )


class Output(Strict):
    """How the finished picture is written to a file."""

    format: PictureFormat = "png"
    quality: int = Field(95, ge=1, le=100, description="JPEG and WebP only.")


class GenerationRequest(Strict):
    """A wish, as a caller writes it: whatever is None is the model card's default.

    `fit` (limits.py) turns it into a FittedRequest or says why it cannot.
    """

    model: str = Field(min_length=1, max_length=200)
    prompt: str = Field(max_length=32_000, repr=False)
    negative_prompt: str = Field("", max_length=32_000, repr=False)
    width: int | None = Field(None, ge=1, le=16_384, description="Pixels.")
    height: int | None = Field(None, ge=1, le=16_384, description="Pixels.")
    num_inference_steps: int | None = Field(None, ge=1, le=1_000)
    guidance_scale: float | None = Field(None, ge=0.0, le=100.0)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    num_images: int = Field(1, ge=1, le=16)
    scheduler: str = Field("auto", min_length=1, max_length=64, description="Noise scheduler.")
    max_sequence_length: int | None = Field(None, ge=1, le=4096, description="Text tokens.")
    edit: Edit | None = None
    output: Output = Output()

    @property
    def task(self) -> Task:
        if self.edit is None:
            return Task.t2i
        return Task.i2i if self.edit.mask_image is None else Task.inpaint


class FittedEdit(Edit):
    strength: float


class FittedRequest(GenerationRequest):
    """A request in which everything is decided; what was accepted is exactly what runs.

    It is a GenerationRequest, so it may be fitted again (a worker does, because a call by handle
    skips HTTP) and comes out equal.
    """

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    max_sequence_length: int | None
    edit: FittedEdit | None = None

    @property
    def cost_mpx_steps(self) -> float:
        """Work in megapixel-steps: pictures x pixels x steps / 1e6."""
        return self.num_images * self.width * self.height * self.num_inference_steps / 1e6
