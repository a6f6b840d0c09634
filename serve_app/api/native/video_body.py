"""The body of POST /api/generate/video, which the task dialect takes too."""

import secrets

from pydantic import AliasChoices, Field

from deployments.protocol.errors import BadRequest
from deployments.protocol.request import (
    SEEDS,
    Edit,
    FitMode,
    GenerationRequest,
    OutputOptions,
    Task,
    Video,
    VideoCodec,
    VideoFormat,
)
from serve_app.api.schemas.files import ImageBytes
from serve_app.api.schemas.generation import NativeFields
from serve_app.api.schemas.numbers import RANDOM, EndSeed, Fps, Int
from serve_app.api.schemas.seconds import Seconds

VIDEO_FILES = ("image", "last_image")  # the file fields of a form, under any of their names


class VideoBody(NativeFields):
    """What to generate. Only `prompt` is required; the model's defaults fill the rest.

    GET /api/models/ lists what each model allows, under `videos`.
    """

    kind = "video"

    num_frames: Int | None = Field(None, description="Frames; the model lists which numbers it can make.")
    seconds: Seconds | None = Field(
        None,
        gt=0,
        le=600,
        validation_alias=AliasChoices("seconds", "duration"),
        description="Instead of num_frames; the nearest number of frames is taken. `duration` is "
        "another name for it.",
    )
    fps: Fps | None = Field(
        None,
        validation_alias=AliasChoices("fps", "frame_rate"),
        description="Frames shown per second, such as 24, 29.97 or `30000/1001`; `frame_rate` is another "
        "name for it.",
    )
    output_format: VideoFormat = Field("mp4", description="mp4: H.264. webm: VP9, or AV1.")
    output_codec: VideoCodec | None = Field(
        None, description="mp4: h264. webm: vp9 or av1; without it the first of the format."
    )
    output_quality: Int = Field(80, ge=1, le=100, description="Of the encoding: higher is larger and closer.")
    image: ImageBytes | None = Field(
        None,
        repr=False,
        validation_alias=AliasChoices("image", "init_image", "first_frame"),
        description="The first frame of the video; `init_image` and `first_frame` are other names for it.",
    )
    sound: bool = Field(
        True, description="false: leave out the sound that a model makes with its videos, such as LTX-2."
    )
    last_image: ImageBytes | None = Field(
        None,
        repr=False,
        validation_alias=AliasChoices("last_image", "last_frame"),
        description="The last frame of the video, for models whose `videos` have `last_image`; `last_frame` "
        "is another name for it.",
    )
    strength: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Frame-wise videos with `image` only: how far frames may differ.",
    )
    fit: FitMode = Field(
        "crop",
        description="How an `image` or `last_image` of another aspect ratio is fitted: crop, pad or stretch.",
    )
    end_prompt: str | None = Field(None, description="Frame-wise only: what the last frame shows.")
    end_seed: EndSeed = Field(
        None, description="Frame-wise only: the seed of the last frame's noise; -1 for a random one."
    )
    zoom: float | None = Field(
        None,
        description="Frame-wise only, 0.25-4: magnification of the last frame relative to `image`, "
        "or without it to the first generated frame.",
    )
    pan_x: float | None = Field(
        None, description="Frame-wise only, -1 to 1: how far the view moves right, in image widths."
    )
    pan_y: float | None = Field(
        None, description="Frame-wise only, -1 to 1: how far the view moves down, in image heights."
    )

    @property
    def task(self) -> Task:
        return Task.t2v if self.image is None and self.last_image is None else Task.i2v

    def to_request(self, model: str) -> GenerationRequest:
        """The same request without its dialect. Raises BadRequest, or pydantic's ValidationError."""
        if self.image is None and self.strength is not None:
            raise BadRequest("strength needs a picture to start from; send image too", param="strength")
        return GenerationRequest(
            model=model,
            **self.shared_arguments(),
            edit=None if self.image is None else Edit(image=self.image, strength=self.strength),
            fit=self.fit,
            output=OutputOptions(previews=self.previews),
            video=Video(
                num_frames=self.num_frames,
                seconds=self.seconds,
                fps=self.fps,
                format=self.output_format,
                codec=self.output_codec,
                quality=self.output_quality,
                sound=self.sound,
                last_image=self.last_image,
                end_prompt=self.end_prompt,
                end_seed=secrets.randbelow(SEEDS) if self.end_seed == RANDOM else self.end_seed,
                zoom=self.zoom,
                pan_x=self.pan_x,
                pan_y=self.pan_y,
            ),
        )
