"""The wishes for videos: the native one and OpenAI's, and OpenAI's video object."""

from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field

from deployments.protocol.errors import BadRequest
from deployments.protocol.request import (
    MAX_PREVIEWS,
    Edit,
    GenerationRequest,
    OutputOptions,
    ResolvedRequest,
    Strict,
    Task,
    Video,
    VideoCodec,
    VideoFormat,
)
from serve_app.api.schemas.image import PictureBytes
from serve_app.api.schemas.lora import LoraFields
from serve_app.api.schemas.openai import pixels
from serve_app.jobs.job import Job, JobState


def _number(value: Any) -> Any:
    """OpenAI's clients send seconds as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError("must be a number of seconds, such as 4") from None
    return value


Seconds = Annotated[float, BeforeValidator(_number)]


class VideoBody(LoraFields):
    """What shall be filmed. Only `prompt` is needed; the model fills the rest.

    What a model allows stands in GET /api/models/, under `videos`.
    """

    prompt: str = Field(examples=["a red circle moving left"])
    model: str | None = Field(None, description="Id or alias; without it a model that is ready.")
    negative_prompt: str = ""
    width: int | None = Field(None, description="Pixels.", examples=[64])
    height: int | None = Field(None, description="Pixels.", examples=[64])
    num_frames: int | None = Field(None, description="The model says which numbers it can make.")
    seconds: Seconds | None = Field(
        None, gt=0, le=600, description="Instead of num_frames; the nearest number of frames is taken."
    )
    fps: int | None = Field(None, description="Frames shown per second.")
    num_inference_steps: int | None = Field(
        None,
        validation_alias=AliasChoices("num_inference_steps", "steps"),
        description="Denoising steps; `steps` is another name for it.",
    )
    guidance_scale: float | None = None
    seed: int | None = Field(None, description="0 to 2^63-1; without it a random one.", examples=[7])
    scheduler: str = "auto"
    max_sequence_length: int | None = None
    output_format: VideoFormat = Field("mp4", description="mp4: H.264. webm: VP9, or AV1.")
    output_codec: VideoCodec | None = Field(
        None, description="mp4: h264. webm: vp9 or av1; without it the first of the format."
    )
    output_quality: int = Field(80, ge=1, le=100, description="Of the encoding: bytes against likeness.")
    previews: int = Field(0, ge=0, le=MAX_PREVIEWS, description="Where the model can show any.")
    webhook_url: str | None = Field(
        None,
        max_length=2048,
        repr=False,
        description="An https address that is told when the job has ended, signed as Standard Webhooks.",
    )
    image: PictureBytes | None = Field(None, repr=False, description="The picture the video begins with.")
    strength: float | None = Field(
        None, ge=0, le=1, description="Frame-wise videos with `image` only: how far frames may leave it."
    )
    end_prompt: str | None = Field(None, description="Frame-wise only: what the last frame shows.")
    end_seed: int | None = Field(None, description="Frame-wise only: whose noise the last frame has.")
    zoom: float | None = Field(
        None,
        description="Frame-wise only, 0.25-4: how much nearer the last frame sees `image`, or without it the "
        "picture of the prompt.",
    )
    pan_x: float | None = Field(
        None, description="Frame-wise only, -1 to 1: how far the view travels right, in picture widths."
    )
    pan_y: float | None = Field(
        None, description="Frame-wise only, -1 to 1: how far the view travels down, in picture heights."
    )

    @property
    def task(self) -> Task:
        return Task.t2v if self.image is None else Task.i2v

    def to_request(self, model: str) -> GenerationRequest:
        """The same wish, dialect-free. Raises BadRequest, or pydantic's ValidationError past hard bounds."""
        if self.image is None and self.strength is not None:
            raise BadRequest("strength needs a picture to start from; send image too", param="strength")
        return GenerationRequest(
            model=model,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            width=self.width,
            height=self.height,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            seed=self.seed,
            scheduler=self.scheduler,
            max_sequence_length=self.max_sequence_length,
            edit=None if self.image is None else Edit(image=self.image, strength=self.strength),
            output=OutputOptions(previews=self.previews),
            video=Video(
                num_frames=self.num_frames,
                seconds=self.seconds,
                fps=self.fps,
                format=self.output_format,
                codec=self.output_codec,
                quality=self.output_quality,
                end_prompt=self.end_prompt,
                end_seed=self.end_seed,
                zoom=self.zoom,
                pan_x=self.pan_x,
                pan_y=self.pan_y,
            ),
        )


class ImageReference(Strict):
    """A picture as OpenAI's JSON brings it."""

    image_url: PictureBytes = Field(repr=False)


class OpenAIVideoBody(LoraFields):
    """OpenAI's fields, and after them those that vLLM-Omni added under these names."""

    prompt: str = Field(examples=["a red circle moving left"])
    model: str | None = None
    seconds: Seconds | None = Field(None, gt=0, le=600, description="As text or number.")
    size: str | None = Field(None, description="Width x height, such as '1280x720'.")
    input_reference: PictureBytes | ImageReference | None = Field(
        None, repr=False, description="The first frame: a file, base64, or {image_url: a data URL}."
    )
    reference_url: PictureBytes | None = Field(
        None, repr=False, validation_alias="input_reference[image_url]", description="The same, in a form."
    )
    user: str | None = Field(None, description="Taken and ignored.")

    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    output_format: VideoFormat | None = None

    @property
    def task(self) -> Task:
        return Task.t2v if self._picture is None else Task.i2v

    def to_request(self, model: str) -> GenerationRequest:
        """The same wish, dialect-free. Raises BadRequest, or pydantic's ValidationError past hard bounds."""
        width, height = pixels(self.size, self.width, self.height)
        return GenerationRequest(
            model=model,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt or "",
            width=width,
            height=height,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            seed=self.seed,
            edit=None if self._picture is None else Edit(image=self._picture),
            video=Video(
                num_frames=self.num_frames,
                seconds=self.seconds,
                fps=self.fps,
                format=self.output_format or "mp4",
            ),
        )

    @property
    def _picture(self) -> bytes | None:
        given = self.input_reference
        if isinstance(given, ImageReference):
            return given.image_url
        return self.reference_url if given is None else given


class VideoRemixBody(Strict):
    """A finished video once more, by another prompt."""

    prompt: str


class RemixRequest(VideoRemixBody):
    """What a remix asks for: all as it was, but the prompt."""

    original: ResolvedRequest

    @property
    def model(self) -> str | None:
        return self.original.model

    @property
    def task(self) -> Task:
        return self.original.task

    def to_request(self, model: str) -> GenerationRequest:
        """The same wish, dialect-free."""
        return self.original.model_copy(update={"model": model, "prompt": self.prompt})


class VideoId(Strict):
    """A finished video of the caller's."""

    id: str


class VideoEditBody(Strict):
    """A finished video once more, by another prompt, as OpenAI's `edits` has it."""

    prompt: str
    video: VideoId | bytes | None = Field(None, repr=False, description="{id} of a finished video.")
    video_id: str | None = Field(None, validation_alias="video[id]", description="The same, in a form.")

    @property
    def source_id(self) -> str:
        """Raises BadRequest where the body names no video."""
        if isinstance(self.video, bytes):
            raise BadRequest(
                "no model here takes a video file; send video={'id': ...} of a video made here", param="video"
            )
        found = self.video_id if self.video is None else self.video.id
        if found is None:
            raise BadRequest("video is missing; send video={'id': ...} of a video made here", param="video")
        return found


class VideoExtendBody(VideoEditBody):
    """A finished frame-wise video goes on from its last frame."""

    seconds: Seconds = Field(gt=0, le=600, description="Of the new part, which is all that is answered.")


class ExtendRequest(Strict):
    """What begins with the last frame of the original, and goes to the new prompt."""

    original: ResolvedRequest
    prompt: str
    seconds: float

    @property
    def model(self) -> str | None:
        return self.original.model

    @property
    def task(self) -> Task:
        return Task.t2v

    def to_request(self, model: str) -> GenerationRequest:
        """The same wish, dialect-free. Raises BadRequest for videos that nothing here can go on with."""
        last = self.original
        video = last.video
        assert video is not None, "only videos are extended"
        if not video.framewise or video.moves or last.edit is not None:
            raise BadRequest(
                "only frame-wise videos whose frames come from seeds and prompts can go on from their last "
                "frame; send that frame as input_reference to POST /v1/videos instead",
                param="video",
            )
        begin = last.prompt if video.end_prompt is None else video.end_prompt
        return GenerationRequest(
            model=model,
            prompt=begin,
            negative_prompt=last.negative_prompt,
            width=last.width,
            height=last.height,
            num_inference_steps=last.num_inference_steps,
            guidance_scale=last.guidance_scale,
            seed=last.seed if video.end_seed is None else video.end_seed,
            scheduler=last.scheduler,
            max_sequence_length=last.max_sequence_length,
            loras=last.loras,
            output=last.output,
            video=Video(
                seconds=self.seconds,
                fps=video.fps,
                format=video.format,
                codec=video.codec,
                quality=video.quality,
                end_prompt=None if self.prompt == begin else self.prompt,
            ),
        )


class VideoError(BaseModel):
    code: str
    message: str
    param: str | None = None
    type: str = "video_generation_error"


STATUSES: dict[JobState, Literal["queued", "in_progress", "completed", "failed"]] = {
    JobState.queued: "queued",
    JobState.processing: "in_progress",
    JobState.completed: "completed",
    JobState.failed: "failed",
    JobState.cancelled: "failed",
}


class VideoObject(BaseModel):
    """OpenAI's video; `fps`, `num_frames`, `seed` and `generation_s` are ours. Times are unix seconds."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    seconds: str
    size: str
    remixed_from_video_id: str | None = None
    error: VideoError | None = None
    fps: int
    num_frames: int
    seed: int
    generation_s: float | None = None

    @classmethod
    def of(cls, job: Job, kept_s: int, remixed_from: str | None = None) -> Self:
        """kept_s: for how long an ended job is remembered."""
        request, video = job.request, job.request.video
        assert video is not None, "only videos are shown as such"
        error = None
        if job.error is not None:
            error = VideoError(code=job.error.kind, message=job.error.message, param=job.error.param)
        elif job.state is JobState.cancelled:
            error = VideoError(code="cancelled", message="the video was cancelled")
        return cls(
            id=job.id,
            model=request.model,
            status=STATUSES[job.state],
            progress=job.percent,
            created_at=int(job.created_at),
            completed_at=None if job.completed_at is None else int(job.completed_at),
            expires_at=None if job.completed_at is None else int(job.completed_at) + kept_s,
            prompt=request.prompt,
            seconds=f"{video.num_frames / video.fps:.4g}",
            size=f"{request.width}x{request.height}",
            remixed_from_video_id=remixed_from,
            error=error,
            fps=video.fps,
            num_frames=video.num_frames,
            seed=request.seed,
            generation_s=job.generation_s,
        )


class VideoPage(BaseModel):
    """OpenAI's list."""

    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    id: str
    deleted: bool = True
    object: Literal["video.deleted"] = "video.deleted"
