"""The native wish for pictures: what POST /api/generate/image takes."""

import base64
import binascii
from typing import Annotated, Any, Self

from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)

from deployments.protocol.errors import BadRequest
from deployments.protocol.request import (
    MAX_CONTROL_WEIGHT,
    MAX_CONTROLS,
    MAX_PREVIEWS,
    Control,
    ControlType,
    Edit,
    GenerationRequest,
    OutputOptions,
    PictureFormat,
    Priority,
    Strict,
    Task,
)
from serve_app.api.schemas.lora import LoraFields


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


def _switch_or_part(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """One fault for a field that may be of two types; pydantic would tell one for each."""
    try:
        return handler(value)
    except ValidationError:
        raise ValueError("must be true, false, or a number between 0 and 1, such as 0.8") from None


Weight = Annotated[float, Field(ge=0, le=MAX_CONTROL_WEIGHT)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ControlBody(Strict):
    """One picture whose edges, depth or pose the result shall follow."""

    image: PictureBytes = Field(repr=False)
    type: ControlType
    weight: Weight = Field(1.0, description="0 leaves it without effect.")
    start: Fraction = Field(0.0, description="Part of the steps before control begins.")
    end: Fraction = Field(1.0, description="Part of the steps after which it ends.")
    is_map: bool | None = Field(
        None,
        description="true: a control map already; false: a plain picture. Left out, an edge map is "
        "recognized and everything else is a plain picture.",
    )

    @model_validator(mode="after")
    def _begins_before_it_ends(self) -> Self:
        if self.start >= self.end:
            raise ValueError(f"start is {self.start:g} and end {self.end:g}; start must be below end")
        return self

    def to_control(self) -> Control:
        return Control(
            image=self.image,
            type=self.type,
            weight=self.weight,
            start=self.start,
            end=self.end,
            is_map=self.is_map,
        )


class ImageBody(LoraFields):
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
    previews: int = Field(
        0, ge=0, le=MAX_PREVIEWS, description="Rough looks at the unfinished picture, told as events."
    )
    priority: Priority = Field(
        "normal",
        description="Of this job: high goes before normal before low, within everybody's fair share.",
    )
    webhook_url: str | None = Field(
        None,
        max_length=2048,
        repr=False,
        description="An https address that is told of the ending, signed as Standard Webhooks has it.",
    )
    image: PictureBytes | None = Field(None, repr=False, description="A picture to start from.")
    mask_image: PictureBytes | None = Field(
        None, repr=False, description="White is painted anew, black is kept; needs `image`."
    )
    strength: float | None = Field(
        None, ge=0, le=1, description="0 keeps the picture, 1 replaces it; needs `image`."
    )

    controls: list[ControlBody] = Field(
        [], max_length=MAX_CONTROLS, description="Control pictures, several at once; JSON only."
    )
    control_image: PictureBytes | None = Field(
        None, repr=False, description="One control picture; the other control_ fields describe it."
    )
    control_type: ControlType | None = None
    control_weight: Weight | None = Field(None, description="0 leaves it without effect; 1 by default.")
    control_start: Fraction | None = Field(None, description="Part of the steps before control begins.")
    control_end: Fraction | None = Field(None, description="Part of the steps after which it ends.")
    control_is_map: bool | None = Field(None, description="As `is_map` of `controls`.")
    refine: bool = Field(False, description="Redraw the details of `image`; for refiner models.")
    refiner: Annotated[bool | Annotated[float, Field(gt=0, lt=1)] | None, WrapValidator(_switch_or_part)] = (
        Field(
            None,
            description="Let the model's refiner make the last steps: true, or the part of the steps before.",
        )
    )

    @property
    def control_types(self) -> set[ControlType]:
        """Kinds of control picture in it."""
        kinds = {control.type for control in self.controls}
        return kinds if self.control_type is None else kinds | {self.control_type}

    @property
    def task(self) -> Task:
        if self.refine:
            return Task.refine
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
            controls=self._controls(),
            refine=self.refine,
            refiner=self.refiner,
            output=OutputOptions(
                format=self.output_format, quality=self.output_quality, previews=self.previews
            ),
            priority=self.priority,
        )

    def _edit(self) -> Edit | None:
        if self.image is not None:
            return Edit(image=self.image, mask_image=self.mask_image, strength=self.strength)
        for name, value in (("mask_image", self.mask_image), ("strength", self.strength)):
            if value is not None:
                raise BadRequest(f"{name} needs a picture to start from; send image too", param=name)
        return None

    def _controls(self) -> tuple[Control, ...]:
        described = {
            "control_type": self.control_type,
            "control_weight": self.control_weight,
            "control_start": self.control_start,
            "control_end": self.control_end,
            "control_is_map": self.control_is_map,
        }
        if self.control_image is None:
            for name, value in described.items():
                if value is not None:
                    raise BadRequest(f"{name} needs a control picture; send control_image too", param=name)
            return tuple(control.to_control() for control in self.controls)
        if self.controls:
            raise BadRequest(
                "control_image and controls are both there; send one of them", param="control_image"
            )
        if self.control_type is None:
            raise BadRequest(
                "control_image needs its control_type: canny, depth or pose", param="control_type"
            )
        start = 0.0 if self.control_start is None else self.control_start
        end = 1.0 if self.control_end is None else self.control_end
        if start >= end:
            raise BadRequest(
                f"control_start is {start:g} and control_end {end:g}; start must be below end",
                param="control_start",
            )
        weight = 1.0 if self.control_weight is None else self.control_weight
        return (
            Control(
                image=self.control_image,
                type=self.control_type,
                weight=weight,
                start=start,
                end=end,
                is_map=self.control_is_map,
            ),
        )
