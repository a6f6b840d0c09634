"""What to generate, independent of any API dialect, in diffusers' parameter names."""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_SEED = 2**63 - 1
SEEDS = 2**32  # random seeds are below it: as other tools draw them, and exact in JavaScript's numbers
MAX_REFERENCES = 10  # pictures that one edit refers to; each adds as many tokens as it has patches
MAX_CONTROLS = 4  # of one request; each costs a forward of its ControlNet at every step
MAX_CONTROL_WEIGHT = 2.0
MAX_PREVIEWS = 8
MAX_LORAS = 4  # of one request; their ranks add up in every layer they touch
MAX_LORA_WEIGHT = 2.0
DIGEST = r"^[0-9a-f]{64}$"
MAX_FRAMES = 1_024  # of one video
MAX_FPS = 60
MAX_FEATHER = 256  # pixels
MAX_GROW = 8_192  # pixels on one side
PictureFormat = Literal["png", "jpeg", "webp"]
VideoFormat = Literal["mp4", "webm"]
VideoCodec = Literal["h264", "vp9", "av1"]
MAX_ZOOM = 4.0
ControlType = Literal["canny", "depth", "pose"]
FitMode = Literal["crop", "pad", "stretch"]
MaskChannel = Literal["luminance", "alpha"]
Priority = Literal["low", "normal", "high"]
# whether other requests may change bits of a result: only where it cannot be avoided, never, or as it comes
Exactness = Literal["prefer", "strict", "off"]


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
    """The kind of generation; it selects the diffusers pipeline class."""

    t2i = "t2i"
    i2i = "i2i"
    inpaint = "inpaint"
    edit = "edit"  # follows an instruction about reference pictures: no mask, no strength
    refine = "refine"  # img2img that renews the finest details, with a refiner's weights
    t2v = "t2v"
    i2v = "i2v"  # image to video: begins or ends with a given picture


class Grow(Strict):
    """How far a picture is extended on each side, in pixels of the given file."""

    left: int = Field(0, ge=0, le=MAX_GROW)
    right: int = Field(0, ge=0, le=MAX_GROW)
    top: int = Field(0, ge=0, le=MAX_GROW)
    bottom: int = Field(0, ge=0, le=MAX_GROW)

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        if not (self.left or self.right or self.top or self.bottom):
            raise ValueError("grow needs at least one side")
        return self


class Edit(Strict):
    """A picture to start from. With a mask, only what the mask marks is generated anew.

    The fields after `strength` have an effect with a mask only: `is_masked`.
    """

    image: bytes = Field(description="A PNG, JPEG or WebP file.", repr=False)
    mask_image: bytes | None = Field(
        None, description="A picture file; `mask_channel` says which part is generated anew.", repr=False
    )
    strength: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(
        None,
        description="0 keeps the picture, 1 replaces it. None: the card's default; 1 where the picture "
        "is transparent or grows.",
    )
    mask_channel: MaskChannel = Field(
        "luminance",
        description="luminance: white is generated anew, black and transparent pixels are kept. alpha: "
        "transparent pixels are generated anew, opaque ones are kept; without mask_image, those of `image`.",
    )
    paste_back: bool = Field(
        True, description="Put the given picture back where the mask keeps it, byte for byte."
    )
    feather: int = Field(
        8,
        ge=0,
        le=MAX_FEATHER,
        description="Width in pixels of the smooth transition outside of the mask, for paste_back.",
    )
    only_masked: bool = Field(
        False, description="Generate the masked area and a margin alone, at the full size of the request."
    )
    only_masked_padding: int = Field(
        32, ge=0, le=MAX_GROW, description="The margin, in pixels of the picture."
    )
    grow: Grow | None = Field(
        None, description="Extend the picture; the new area is generated as if the mask marked it."
    )

    @property
    def is_masked(self) -> bool:
        """Whether parts are kept and others are generated anew."""
        return self.mask_image is not None or self.mask_channel == "alpha" or self.grow is not None

    @property
    def has_pixels(self) -> bool:
        """Whether the picture has something to begin with in all that is generated anew."""
        return self.grow is None and (self.mask_image is not None or self.mask_channel != "alpha")


class Control(Strict):
    """A picture whose edges, depth or pose the result follows, through a ControlNet."""

    image: bytes = Field(description="A PNG, JPEG or WebP file.", repr=False)
    type: ControlType
    weight: float = Field(
        1.0, ge=0.0, le=MAX_CONTROL_WEIGHT, description="0 leaves the picture without effect."
    )
    start: float = Field(0.0, ge=0.0, le=1.0, description="Part of the steps before control begins.")
    end: float = Field(1.0, ge=0.0, le=1.0, description="Part of the steps after which control ends.")
    is_map: bool | None = Field(
        None,
        description="True: a finished control map; false: a plain picture. None: an edge map is "
        "recognized, everything else is a plain picture.",
    )


class Lora(Strict):
    """A LoRA that acts on this request only, named by the digest of its file."""

    id: str = Field(pattern=DIGEST, description="SHA-256 of the safetensors file, in hex.")
    weight: float = Field(1.0, ge=-MAX_LORA_WEIGHT, le=MAX_LORA_WEIGHT)
    name: str = Field("", max_length=200, description="The caller's name for it; for metadata only.")
    file: bytes | None = Field(
        None, description="The file itself, for callers by Serve handle, which have no registry.", repr=False
    )

    @classmethod
    def of(cls, file: bytes, weight: float = 1.0, name: str = "") -> Self:
        """The LoRA of this safetensors file."""
        return cls(id=hashlib.sha256(file).hexdigest(), weight=weight, name=name, file=file)

    @model_validator(mode="after")
    def _check_file_matches_id(self) -> Self:
        if self.file is not None and hashlib.sha256(self.file).hexdigest() != self.id:
            raise ValueError("the file's SHA-256 is not the id")
        return self


class OutputOptions(Strict):
    """How a finished picture is encoded, and how many previews are sent before."""

    format: PictureFormat = "png"
    quality: int = Field(95, ge=1, le=100, description="JPEG and WebP only.")
    previews: int = Field(
        0, ge=0, le=MAX_PREVIEWS, description="Rough pictures of the unfinished result, sent as events."
    )


class Video(Strict):
    """Asks for a video as the result. A field that is None takes the card's default."""

    num_frames: int | None = Field(None, ge=1, le=MAX_FRAMES)
    fps: int | float | None = Field(None, ge=1, le=MAX_FPS, description="Frames shown per second.")
    seconds: float | None = Field(
        None, gt=0, le=600, description="Instead of num_frames; the nearest number of frames is taken."
    )
    format: VideoFormat = "mp4"
    codec: VideoCodec | None = Field(
        None, description="mp4: h264. webm: vp9 or av1. None: the first of the format."
    )
    quality: int = Field(
        80, ge=1, le=100, description="Of the encoding; higher is larger and closer to the frames."
    )
    sound: bool = Field(True, description="False: leave out the sound that the model makes.")
    last_image: bytes | None = Field(
        None,
        repr=False,
        description="The last frame, a PNG, JPEG or WebP file; `edit.image` is the first one.",
    )
    end_prompt: str | None = Field(
        None, max_length=32_000, repr=False, description="Frame-wise only: what the last frame shows."
    )
    end_seed: int | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="Frame-wise only: seed of the noise that the last frame begins with.",
    )
    zoom: float | None = Field(
        None,
        ge=1 / MAX_ZOOM,
        le=MAX_ZOOM,
        description="Frame-wise only: zoom of the last frame; 2 shows half the width.",
    )
    pan_x: float | None = Field(
        None, ge=-1, le=1, description="Frame-wise only: how far the view moves right, in picture widths."
    )
    pan_y: float | None = Field(
        None, ge=-1, le=1, description="Frame-wise only: how far the view moves down, in picture heights."
    )

    @property
    def moves(self) -> bool:
        """Whether the view moves: every frame shows another part of one picture."""
        return (self.zoom, self.pan_x, self.pan_y) != (None, None, None)


class GenerationRequest(Strict):
    """A request as a caller writes it. A field that is None takes the model card's default.

    validation.resolve.resolve turns it into a ResolvedRequest or raises the reason why it cannot.
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
    references: tuple[bytes, ...] = Field(
        (),
        max_length=MAX_REFERENCES,
        strict=False,
        repr=False,
        description="PNG, JPEG or WebP files that the prompt refers to, for models that edit by instruction.",
    )
    controls: tuple[Control, ...] = Field((), max_length=MAX_CONTROLS, strict=False)
    fit: FitMode = Field(
        "crop",
        description="How given pictures of another aspect ratio are fitted: crop cuts what is over, pad adds "
        "a border, stretch distorts.",
    )
    loras: tuple[Lora, ...] = Field((), max_length=MAX_LORAS, strict=False)
    refine: bool = Field(False, description="Renew the details of `edit.image`, with a refiner.")
    refiner: bool | Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None,
        description="Part of the steps at which the model's refiner takes over; true: the card's default.",
    )
    output: OutputOptions = OutputOptions()
    video: Video | None = None
    priority: Priority = Field("normal", description="Of the request's steps on a replica under load.")
    deadline_s: float | None = Field(
        None, gt=0, description="Wanted within this many seconds of its arrival at a replica; best effort."
    )
    exact: Exactness | None = Field(
        None,
        description="strict: no bit may depend on other requests. prefer: none does where that is proven; "
        "otherwise the answer says so. off: nothing is promised.",
    )

    @model_validator(mode="after")
    def _check_loras_differ(self) -> Self:
        if len({lora.id for lora in self.loras}) < len(self.loras):
            raise ValueError("loras names a LoRA twice; add up its weights instead")
        return self

    @property
    def task(self) -> Task:
        if self.refine:
            return Task.refine
        if self.video is not None:
            return Task.t2v if self.edit is None and self.video.last_image is None else Task.i2v
        if self.references:
            return Task.edit
        if self.edit is None:
            return Task.t2i
        return Task.inpaint if self.edit.is_masked else Task.i2i


class ResolvedEdit(Edit):
    strength: float
    result_width: int | None = Field(
        None, description="Of the finished picture, where it is not the size of the request; pixels."
    )
    result_height: int | None = None

    @property
    def settings(self) -> dict[str, object]:
        """Everything but the pictures, as JSON; of the options of a mask nothing without one."""
        pictures = {"image", "mask_image"}
        if not self.is_masked:
            return {"strength": self.strength}
        return self.model_dump(mode="json", exclude=pictures, exclude_none=True)


class ResolvedVideo(Video):
    """A video in which everything is decided; `seconds` has become num_frames."""

    num_frames: int
    fps: int | float
    seconds: None = None
    framewise: bool = Field(False, description="A picture model makes every frame as a picture.")

    @property
    def pictures(self) -> int:
        """Work in pictures: four frames of a video model share one latent."""
        return self.num_frames if self.framewise else 1 + (self.num_frames - 1) // 4


class ResolvedRequest(GenerationRequest):
    """A request in which everything is decided; what was accepted is exactly what runs.

    It is a GenerationRequest, so it may be resolved again (a replica does, because a call by Serve handle
    does not pass HTTP), with an equal result.
    """

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    max_sequence_length: int | None
    edit: ResolvedEdit | None = None
    video: ResolvedVideo | None = None
    refiner: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None

    @property
    def pixels_at_once(self) -> int:
        """Of one picture, or of a video that is decoded as a whole."""
        frames = 1 if self.video is None or self.video.framewise else self.video.num_frames
        return self.width * self.height * frames

    @property
    def cost_mpx_steps(self) -> float:
        """Work in megapixel-steps: pictures x pixels x steps / 1e6."""
        pictures = self.num_images if self.video is None else self.video.pictures
        return pictures * self.width * self.height * self.num_inference_steps / 1e6
