"""The body of POST /api/generate/image, which the task dialect takes too."""

from typing import Annotated, Any, Self

from pydantic import (
    AliasChoices,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from deployments.protocol.errors import BadRequest
from deployments.protocol.request import (
    MAX_CONTROL_WEIGHT,
    MAX_CONTROLS,
    MAX_FEATHER,
    MAX_GROW,
    MAX_REFERENCES,
    Control,
    ControlType,
    Edit,
    FitMode,
    GenerationRequest,
    Grow,
    MaskChannel,
    OutputOptions,
    PictureFormat,
    Priority,
    Task,
)
from serve_app.api.schemas.body import RequestBody
from serve_app.api.schemas.files import ImageBytes, ImageList
from serve_app.api.schemas.generation import NativeFields
from serve_app.api.schemas.numbers import Int, in_form

IMAGE_FILES = (
    "image",
    "mask_image",
    "control_image",
    "reference_images",
)  # the file fields of a form, under any of their names

EDIT_FIELDS = (  # that Edit has under the same names
    "mask_image",
    "strength",
    "mask_channel",
    "paste_back",
    "feather",
    "only_masked",
    "only_masked_padding",
)

GrowPixels = Annotated[Int, Field(ge=0, le=MAX_GROW)]
Weight = Annotated[float, Field(ge=0, le=MAX_CONTROL_WEIGHT)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _bool_or_fraction(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    """One error message for a field of two types; pydantic would give one for each type."""
    try:
        return handler(_TEXT.validate_strings(value) if in_form(info) else value)
    except ValidationError:
        raise ValueError("must be true, false, or a number between 0 and 1, such as 0.8") from None


_TEXT: TypeAdapter[bool | float] = TypeAdapter(bool | float)  # as a form writes it
BoolOrFraction = Annotated[bool | Annotated[float, Field(gt=0, lt=1)], WrapValidator(_bool_or_fraction)]


class ControlBody(RequestBody):
    """One image whose edges, depth or pose the result follows."""

    image: ImageBytes = Field(repr=False)
    type: ControlType
    weight: Weight = Field(1.0, description="0 leaves it without effect.")
    start: Fraction = Field(0.0, description="Fraction of the steps before control begins.")
    end: Fraction = Field(1.0, description="Fraction of the steps after which control ends.")
    is_map: bool | None = Field(
        None,
        description="true: already a control map; false: a plain image. Without it, an edge map is "
        "recognized and everything else is a plain image.",
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.start >= self.end:
            raise ValueError(f"start is {self.start:g} and end {self.end:g}; start must be below end")
        return self

    def to_control(self) -> Control:
        return Control.model_validate(self.model_dump())


class ImageBody(NativeFields):
    """What to generate. Only `prompt` is required; the model's defaults fill the rest.

    GET /api/models/ lists what each model allows; values that a model replaces come back as warnings.
    """

    kind = "image"

    num_images: Int = Field(
        1,
        validation_alias=AliasChoices(
            "num_images", "n", "batch_size", "num_outputs", "num_images_per_prompt"
        ),
        description="Images; their seeds count up from `seed`. `n`, `batch_size`, `num_outputs` and "
        "`num_images_per_prompt` are other names for it.",
    )
    output_format: PictureFormat = "png"
    output_quality: Int = Field(95, ge=1, le=100, description="JPEG and WebP only.")
    priority: Priority = Field(
        "normal",
        description="Of this job: high before normal before low, within each owner's fair share.",
    )
    image: ImageBytes | None = Field(
        None,
        repr=False,
        validation_alias=AliasChoices("image", "init_image"),
        description="An image to start from; `init_image` is another name for it.",
    )
    mask_image: ImageBytes | None = Field(
        None,
        repr=False,
        validation_alias=AliasChoices("mask_image", "mask"),
        description="White is regenerated, black and transparent pixels are kept; needs `image`. `mask` is "
        "another name for it.",
    )
    strength: float | None = Field(
        None,
        ge=0,
        le=1,
        validation_alias=AliasChoices("strength", "denoising_strength", "prompt_strength"),
        description="0 keeps the image, 1 replaces it; needs `image`. `denoising_strength` and "
        "`prompt_strength` are other names for it.",
    )
    mask_channel: MaskChannel | None = Field(
        None,
        description="luminance (the default), or alpha: transparent pixels are regenerated and opaque ones "
        "kept, of `mask_image` or without it of `image`.",
    )
    paste_back: bool | None = Field(
        None,
        description="true (the default): what the mask keeps is byte for byte that of `image`. false: as it "
        "comes out of the model.",
    )
    feather: Int | None = Field(
        None,
        ge=0,
        le=MAX_FEATHER,
        validation_alias=AliasChoices("feather", "mask_blur"),
        description="Pixels of smooth transition outside of the mask, 8 by default; `mask_blur` is another "
        "name for it.",
    )
    only_masked: bool | None = Field(
        None,
        validation_alias=AliasChoices("only_masked", "inpaint_full_res"),
        description="Regenerate the masked area alone, at the model's full size; `inpaint_full_res` is "
        "another name for it.",
    )
    only_masked_padding: Int | None = Field(
        None,
        ge=0,
        le=MAX_GROW,
        validation_alias=AliasChoices("only_masked_padding", "inpaint_full_res_padding"),
        description="Pixels around that area which the model sees too, 32 by default; "
        "`inpaint_full_res_padding` is another name for it.",
    )
    grow_left: GrowPixels = Field(0, description="Extend `image` on this side; the new area is generated.")
    grow_right: GrowPixels = Field(0, description="As `grow_left`.")
    grow_top: GrowPixels = Field(0, description="As `grow_left`.")
    grow_bottom: GrowPixels = Field(0, description="As `grow_left`.")
    fit: FitMode = Field(
        "crop",
        description="How images of another aspect ratio than the result are fitted: crop cuts what is over, "
        "pad adds a border, stretch distorts.",
    )
    controls: list[ControlBody] = Field(
        [], max_length=MAX_CONTROLS, description="Several control images; JSON only."
    )
    control_image: ImageBytes | None = Field(
        None, repr=False, description="One control image; the other control_ fields describe it."
    )
    control_type: ControlType | None = None
    control_weight: Weight | None = Field(None, description="0 leaves it without effect; 1 by default.")
    control_start: Fraction | None = Field(None, description="Fraction of the steps before control begins.")
    control_end: Fraction | None = Field(None, description="Fraction of the steps after which control ends.")
    control_is_map: bool | None = Field(None, description="As `is_map` of `controls`.")
    reference_images: ImageList = Field(
        [],
        max_length=MAX_REFERENCES,
        repr=False,
        validation_alias=AliasChoices("reference_images", "references", "reference_images[]"),
        description="Images that `prompt` refers to as an instruction (make it blue), for models with the "
        "task edit; in a form one part for each. `references` is another name for it.",
    )
    refine: bool = Field(False, description="Redraw the details of `image`; for refiner models.")
    refiner: BoolOrFraction | None = Field(
        None,
        description="Let the model's refiner do the last steps: true, or the fraction of steps before it.",
    )

    @property
    def task(self) -> Task:
        if self.refine:
            return Task.refine
        if self.reference_images:
            return Task.edit
        if self.image is None:
            return Task.t2i
        is_masked = self.mask_image is not None or self.mask_channel == "alpha" or self._grow() is not None
        return Task.inpaint if is_masked else Task.i2i

    @property
    def control_types(self) -> set[ControlType]:
        types = {control.type for control in self.controls}
        return types if self.control_type is None else types | {self.control_type}

    @property
    def uses_refiner(self) -> bool:
        return bool(self.refiner)

    def to_request(self, model: str) -> GenerationRequest:
        """The same request without its dialect. Raises BadRequest, or pydantic's ValidationError."""
        return GenerationRequest(
            model=model,
            **self.shared_arguments(),
            num_images=self.num_images,
            edit=self._edit(),
            references=tuple(self.reference_images),
            controls=self._controls(),
            fit=self.fit,
            refine=self.refine,
            refiner=self.refiner,
            output=OutputOptions(
                format=self.output_format, quality=self.output_quality, previews=self.previews
            ),
            priority=self.priority,
        )

    def _edit(self) -> Edit | None:
        given = self.model_dump(include=set(EDIT_FIELDS), exclude_none=True)
        grow = self._grow()
        if self.image is not None:
            return Edit(image=self.image, grow=grow, **given)
        sides = () if grow is None else tuple(f"grow_{side}" for side, pixels in grow if pixels)
        for name in (*given, *sides):
            raise BadRequest(f"{name} needs a picture to start from; send image too", param=name)
        return None

    def _grow(self) -> Grow | None:
        sides = {
            "left": self.grow_left,
            "right": self.grow_right,
            "top": self.grow_top,
            "bottom": self.grow_bottom,
        }
        return Grow(**sides) if any(sides.values()) else None

    def _controls(self) -> tuple[Control, ...]:
        if self.control_image is not None:
            return (self._single_control(self.control_image),)
        for name in ("control_type", "control_weight", "control_start", "control_end", "control_is_map"):
            if getattr(self, name) is not None:
                raise BadRequest(f"{name} needs a control picture; send control_image too", param=name)
        return tuple(control.to_control() for control in self.controls)

    def _single_control(self, image: bytes) -> Control:
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
        return Control(
            image=image,
            type=self.control_type,
            weight=1.0 if self.control_weight is None else self.control_weight,
            start=start,
            end=end,
            is_map=self.control_is_map,
        )
