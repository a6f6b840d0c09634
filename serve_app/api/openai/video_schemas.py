"""Bodies and answers of /v1/videos."""

from typing import Literal, Self

from pydantic import BaseModel, Field

from deployments.protocol.errors import BadRequest
from deployments.protocol.request import (
    Edit,
    FitMode,
    GenerationRequest,
    ResolvedRequest,
    Task,
    Video,
    VideoFormat,
)
from serve_app.api.schemas.body import RequestBody
from serve_app.api.schemas.files import ImageBytes
from serve_app.api.schemas.generation import OpenAIFields
from serve_app.api.schemas.job import WarningOut
from serve_app.api.schemas.numbers import Fps, Int
from serve_app.api.schemas.seconds import Seconds
from serve_app.api.schemas.submit_body import SubmitDefaults
from serve_app.jobs.job import Job, JobState


class ImageReference(RequestBody):
    """An image as OpenAI's JSON carries it."""

    image_url: ImageBytes = Field(repr=False)


class OpenAIVideoBody(OpenAIFields):
    """OpenAI's fields, and those that vLLM-Omni added."""

    kind = "openai video"

    seconds: Seconds | None = Field(None, gt=0, le=600, description="As text or number.")
    input_reference: ImageBytes | ImageReference | None = Field(
        None, repr=False, description="The first frame: a file, base64, or {image_url: a data URL}."
    )
    reference_url: ImageBytes | None = Field(
        None, repr=False, validation_alias="input_reference[image_url]", description="The same, in a form."
    )
    num_frames: Int | None = Field(None, description="Frames; the model lists which numbers it can make.")
    fps: Fps | None = Field(None, description="Frames shown per second.")
    output_format: VideoFormat | None = None
    fit: FitMode | None = Field(
        None, description="How a first frame of another aspect ratio is fitted: crop, pad or stretch."
    )

    @property
    def task(self) -> Task:
        return Task.t2v if self._first_frame is None else Task.i2v

    def to_request(self, model: str) -> GenerationRequest:
        """The same request without its dialect. Raises BadRequest, or pydantic's ValidationError."""
        return GenerationRequest(
            model=model,
            **self.shared_arguments(),
            edit=None if self._first_frame is None else Edit(image=self._first_frame),
            fit=self.fit or "crop",
            video=Video(
                num_frames=self.num_frames,
                seconds=self.seconds,
                fps=self.fps,
                format=self.output_format or "mp4",
            ),
        )

    @property
    def _first_frame(self) -> bytes | None:
        reference = self.input_reference
        if isinstance(reference, ImageReference):
            return reference.image_url
        return self.reference_url if reference is None else reference


class VideoRemixBody(RequestBody):
    """A finished video again, with another prompt."""

    prompt: str


class RemixRequest(SubmitDefaults):
    """A finished video's request with another prompt."""

    kind = "openai remix"

    prompt: str
    original: ResolvedRequest

    @property
    def model(self) -> str | None:
        return self.original.model

    @property
    def task(self) -> Task:
        return self.original.task

    def to_request(self, model: str) -> GenerationRequest:
        """The original request with the new prompt."""
        return self.original.model_copy(update={"model": model, "prompt": self.prompt})


class VideoId(RequestBody):
    """A finished video of the caller."""

    id: str


class VideoEditBody(RequestBody):
    """A finished video again, with another prompt: OpenAI's `edits`."""

    prompt: str
    video: VideoId | bytes | None = Field(None, repr=False, description="{id} of a finished video.")
    video_id: str | None = Field(None, validation_alias="video[id]", description="The same, in a form.")

    @property
    def source_id(self) -> str:
        """Raises BadRequest when the body names no video."""
        if isinstance(self.video, bytes):
            raise BadRequest(
                "no model here takes a video file; send video={'id': ...} of a video made here", param="video"
            )
        found = self.video_id if self.video is None else self.video.id
        if found is None:
            raise BadRequest("video is missing; send video={'id': ...} of a video made here", param="video")
        return found


class VideoExtendBody(VideoEditBody):
    """Continue a finished frame-wise video from its last frame."""

    seconds: Seconds = Field(gt=0, le=600, description="Of the new part, which alone is returned.")


class ExtendRequest(SubmitDefaults):
    """A video that begins with the last frame of the original and leads to the new prompt."""

    kind = "openai extension"

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
        """Raises BadRequest for videos that no model here can continue."""
        original = self.original
        video = original.video
        assert video is not None, "only videos are extended"
        if not video.framewise or video.moves or original.edit is not None:
            raise BadRequest(
                "only frame-wise videos whose frames come from seeds and prompts can be continued from their "
                "last frame; send that frame as input_reference to POST /v1/videos instead",
                param="video",
            )
        first_prompt = original.prompt if video.end_prompt is None else video.end_prompt
        return GenerationRequest(
            model=model,
            prompt=first_prompt,
            negative_prompt=original.negative_prompt,
            width=original.width,
            height=original.height,
            num_inference_steps=original.num_inference_steps,
            guidance_scale=original.guidance_scale,
            seed=original.seed if video.end_seed is None else video.end_seed,
            scheduler=original.scheduler,
            max_sequence_length=original.max_sequence_length,
            loras=original.loras,
            exact=original.exact,
            output=original.output,
            video=Video(
                seconds=self.seconds,
                fps=video.fps,
                format=video.format,
                codec=video.codec,
                quality=video.quality,
                end_prompt=None if self.prompt == first_prompt else self.prompt,
            ),
        )


class VideoError(BaseModel):
    code: str
    message: str
    param: str | None = None
    type: str = "video_generation_error"

    @classmethod
    def of(cls, job: Job) -> Self | None:
        """None for a job that has neither failed nor been cancelled."""
        if job.error is not None:
            return cls(code=job.error.kind, message=job.error.message, param=job.error.param)
        if job.state is JobState.cancelled:
            return cls(code="cancelled", message="the video was cancelled")
        return None


VideoStatus = Literal["queued", "in_progress", "completed", "failed"]
STATUSES: dict[JobState, VideoStatus] = {
    JobState.queued: "queued",
    JobState.processing: "in_progress",
    JobState.completed: "completed",
    JobState.failed: "failed",
    JobState.cancelled: "failed",
}


class VideoObject(BaseModel):
    """OpenAI's video; `fps`, `num_frames`, `seed`, `warnings` and `generation_s` are Weft's
    additions.

    Times are unix seconds.
    """

    id: str
    object: Literal["video"] = "video"
    model: str
    status: VideoStatus
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    seconds: str
    size: str
    remixed_from_video_id: str | None = None
    error: VideoError | None = None
    fps: int | float
    num_frames: int
    seed: int
    warnings: list[WarningOut]
    generation_s: float | None = None

    @classmethod
    def of(cls, job: Job, kept_s: int, remixed_from: str | None = None) -> Self:
        """kept_s: seconds for which an ended job is stored."""
        request, video = job.request, job.request.video
        assert video is not None, "only videos are shown as such"
        completed_at = None if job.completed_at is None else int(job.completed_at)
        return cls(
            id=job.id,
            model=request.model,
            status=STATUSES[job.state],
            progress=job.percent,
            created_at=int(job.created_at),
            completed_at=completed_at,
            expires_at=None if completed_at is None else completed_at + kept_s,
            prompt=request.prompt,
            seconds=f"{video.num_frames / video.fps:.4g}",
            size=f"{request.width}x{request.height}",
            remixed_from_video_id=remixed_from,
            error=VideoError.of(job),
            fps=video.fps,
            num_frames=video.num_frames,
            seed=request.seed,
            warnings=WarningOut.all_of(job),
            generation_s=job.generation_s,
        )


class VideoPage(BaseModel):
    """OpenAI's list of videos."""

    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    id: str
    deleted: bool = True
    object: Literal["video.deleted"] = "video.deleted"
