"""Jobs as the native dialect shows them."""

from typing import Literal, Self

from pydantic import BaseModel, Field

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.request import (
    Control,
    Exactness,
    FitMode,
    MaskChannel,
    ResolvedRequest,
    ResolvedVideo,
)
from serve_app.api.schemas.usage import JobUsageOut
from serve_app.jobs.job import Job, JobError, JobState, StoredArtifact

EXTENSIONS = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/webp": "webp",
    "video/mp4": "mp4",
    "video/webm": "webm",
}
RESULT_KINDS = ("image", "video")  # kinds of file that a job is for; the others are made from these


class WarningOut(BaseModel):
    """A value that the model's card replaced, or a promise that could not be kept."""

    code: str = Field(examples=["steps_corrected"])
    param: str
    message: str = Field(examples=["FLUX requires exactly 4 steps. Overriding 30 -> 4"])

    @classmethod
    def of(cls, adjustment: Adjustment) -> Self:
        return cls(code=adjustment.code, param=adjustment.param, message=adjustment.message)

    @classmethod
    def all_of(cls, job: Job) -> list[Self]:
        return [cls.of(adjustment) for adjustment in job.warnings]


class JobErrorOut(BaseModel):
    """Why a job failed."""

    kind: str
    message: str
    param: str | None = None

    @classmethod
    def of(cls, error: JobError) -> Self:
        return cls(kind=error.kind, message=error.message, param=error.param)


class JobControlOut(BaseModel):
    """A control image as it is used; the image itself is left out."""

    type: str
    weight: float
    start: float
    end: float
    is_map: bool | None

    @classmethod
    def of(cls, control: Control) -> Self:
        return cls(
            type=control.type,
            weight=control.weight,
            start=control.start,
            end=control.end,
            is_map=control.is_map,
        )


class JobMaskOut(BaseModel):
    """How the mask of an image is used; the images themselves are left out."""

    mask_channel: MaskChannel
    paste_back: bool
    feather: int
    only_masked: bool
    only_masked_padding: int
    grow_left: int
    grow_right: int
    grow_top: int
    grow_bottom: int
    result_width: int = Field(description="Of the finished image; `width` is what the model works at.")
    result_height: int

    @classmethod
    def of(cls, request: ResolvedRequest) -> Self | None:
        """None where there is no mask."""
        edit = request.edit
        if edit is None or not edit.is_masked:
            return None
        grow = edit.grow
        return cls(
            mask_channel=edit.mask_channel,
            paste_back=edit.paste_back,
            feather=edit.feather,
            only_masked=edit.only_masked,
            only_masked_padding=edit.only_masked_padding,
            grow_left=0 if grow is None else grow.left,
            grow_right=0 if grow is None else grow.right,
            grow_top=0 if grow is None else grow.top,
            grow_bottom=0 if grow is None else grow.bottom,
            result_width=edit.result_width or request.width,
            result_height=edit.result_height or request.height,
        )


class JobVideoOut(BaseModel):
    """The video as it is generated."""

    num_frames: int
    fps: int | float
    seconds: float
    format: str
    quality: int
    framewise: bool = Field(description="An image model generates every frame as an image.")
    codec: str | None = Field(None, description="null: the default one of the format.")
    last_image: bool = Field(False, description="Its last frame was given.")
    zoom: float | None = None
    pan_x: float | None = None
    pan_y: float | None = None

    @classmethod
    def of(cls, video: ResolvedVideo) -> Self:
        return cls(
            num_frames=video.num_frames,
            fps=video.fps,
            seconds=round(video.num_frames / video.fps, 3),
            format=video.format,
            quality=video.quality,
            framewise=video.framewise,
            codec=video.codec,
            last_image=video.last_image is not None,
            zoom=video.zoom,
            pan_x=video.pan_x,
            pan_y=video.pan_y,
        )


class JobLoraOut(BaseModel):
    """A LoRA as it is used."""

    sha256: str
    name: str
    weight: float


class JobRequestOut(BaseModel):
    """The request as it runs: with every default filled in."""

    model: str
    task: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int = Field(description="Of the first image. Up to 63 bits: more than a JavaScript number holds.")
    num_images: int
    scheduler: str
    max_sequence_length: int | None
    output_format: str
    output_quality: int
    previews: int
    strength: float | None
    mask: JobMaskOut | None = Field(description="null: the whole image is generated anew.")
    fit: FitMode
    references: int = Field(description="How many reference images an edit has.")
    controls: list[JobControlOut]
    loras: list[JobLoraOut]
    video: JobVideoOut | None
    refiner: float | None = Field(description="Fraction of the steps at which the refiner takes over.")
    exact: Exactness | None = Field(
        description="What is promised of other requests' influence; null: accepted before there was a choice."
    )

    @classmethod
    def of(cls, job: Job) -> Self:
        request = job.request
        return cls(
            model=request.model,
            task=request.task,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            width=request.width,
            height=request.height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            seed=request.seed,
            num_images=request.num_images,
            scheduler=request.scheduler,
            max_sequence_length=request.max_sequence_length,
            output_format=request.output.format,
            output_quality=request.output.quality,
            previews=request.output.previews,
            strength=None if request.edit is None else request.edit.strength,
            mask=JobMaskOut.of(request),
            fit=request.fit,
            references=len(request.references),
            controls=[JobControlOut.of(control) for control in request.controls],
            loras=[JobLoraOut(sha256=lora.id, name=lora.name, weight=lora.weight) for lora in request.loras],
            video=None if request.video is None else JobVideoOut.of(request.video),
            refiner=request.refiner,
            exact=request.exact,
        )


class ArtifactOut(BaseModel):
    """One finished image or video and its links."""

    index: int
    kind: Literal["image", "video"]
    url: str
    thumbnail_url: str | None
    poster_url: str | None = Field(description="Of a video: its first frame.")
    spritesheet_url: str | None = Field(description="Of a video: up to 25 frames in rows of 5.")
    media_type: str
    width: int
    height: int
    seed: int
    size_bytes: int

    @classmethod
    def of(cls, artifact: StoredArtifact, job: Job, prefix: str) -> Self:
        folder = f"{prefix}/api/results/{job.id}"
        stills = {a.kind for a in job.artifacts if a.index == artifact.index}

        def still_url(kind: str) -> str | None:
            return f"{folder}/{artifact.index}/{kind}" if kind in stills else None

        return cls(
            index=artifact.index,
            kind="video" if artifact.kind == "video" else "image",
            url=f"{folder}/{artifact.index}.{EXTENSIONS[artifact.media_type]}",
            thumbnail_url=still_url("thumbnail"),
            poster_url=still_url("poster"),
            spritesheet_url=still_url("spritesheet"),
            media_type=artifact.media_type,
            width=artifact.width,
            height=artifact.height,
            seed=artifact.seed,
            size_bytes=artifact.size_bytes,
        )


class JobOut(BaseModel):
    """The current state of one job. Times are unix seconds."""

    id: str
    kind: Literal["image", "video"]
    status: JobState
    position: int | None = Field(None, description="1: next to begin; null once it has.")
    starts_in_s: float | None = Field(
        None, description="Estimated seconds until it begins; null: it has begun, or no estimate exists."
    )
    cached: bool = Field(description="Its files were copied from an earlier equal request.")
    files_expired: bool = Field(description="Its files were deleted when their retention time was over.")
    percent: int
    step: int
    steps: int = Field(description="0 until the model has begun.")
    created_at: float
    started_at: float | None
    completed_at: float | None
    generation_s: float | None = Field(description="Seconds of work, without the time in the queue.")
    cancel_requested: bool
    request: JobRequestOut
    warnings: list[WarningOut]
    artifacts: list[ArtifactOut]
    error: JobErrorOut | None
    usage: JobUsageOut

    @classmethod
    def of(cls, job: Job, prefix: str, position: int | None = None, starts_in_s: float | None = None) -> Self:
        """prefix: what precedes /api in links."""
        return cls(
            id=job.id,
            kind="image" if job.request.video is None else "video",
            status=job.state,
            position=position,
            starts_in_s=starts_in_s,
            cached=job.cached,
            files_expired=job.files_expired,
            percent=job.percent,
            step=job.step,
            steps=job.steps,
            created_at=job.created_at,
            started_at=job.started_at,
            completed_at=job.completed_at,
            generation_s=job.generation_s,
            cancel_requested=job.cancel_requested,
            request=JobRequestOut.of(job),
            warnings=WarningOut.all_of(job),
            artifacts=[ArtifactOut.of(a, job, prefix) for a in job.artifacts if a.kind in RESULT_KINDS],
            error=None if job.error is None else JobErrorOut.of(job.error),
            usage=JobUsageOut.of(job),
        )


class JobAccepted(BaseModel):
    """The job is stored, and survives the loss of any process."""

    id: str
    status: JobState
    warnings: list[WarningOut]

    @classmethod
    def of(cls, job: Job) -> Self:
        return cls(id=job.id, status=job.state, warnings=WarningOut.all_of(job))


class WebhookSecret(BaseModel):
    """The caller's own secret; anyone who has it can forge webhooks to the caller."""

    secret: str = Field(examples=["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"])


class JobList(BaseModel):
    """Jobs, newest first."""

    jobs: list[JobOut]
    next_cursor: str | None = Field(description="`cursor` of the next page; null: this is the last one.")


AfterCancel = Literal["cancelled", "cancelling", "completed", "failed"]


class JobEnded(BaseModel):
    """What a DELETE did."""

    id: str
    status: AfterCancel | Literal["deleted"] = Field(
        description="cancelling: the job runs, and stops at its next step. completed, failed: it ended "
        "before it could be cancelled; it stays until it is deleted."
    )
