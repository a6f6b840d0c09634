"""What the native dialect tells about jobs."""

from typing import Literal, Self

from pydantic import BaseModel, Field

from deployments.validation.resolve import Adjustment
from serve_app.jobs.job import Job, JobError, JobState, StoredArtifact

EXTENSIONS = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/webp": "webp",
    "video/mp4": "mp4",
    "video/webm": "webm",
}
RESULTS = ("image", "video")  # kinds of file that a job is for; the others are looks at these


class WarningOut(BaseModel):
    """One value the model's card replaced."""

    code: str = Field(examples=["steps_corrected"])
    param: str
    message: str = Field(examples=["FLUX requires exactly 4 steps. Overriding 30 -> 4"])

    @classmethod
    def of(cls, adjustment: Adjustment) -> Self:
        return cls(code=adjustment.code, param=adjustment.param, message=adjustment.message)


class JobErrorOut(BaseModel):
    """Why a job failed."""

    kind: str
    message: str
    param: str | None = None

    @classmethod
    def of(cls, error: JobError) -> Self:
        return cls(kind=error.kind, message=error.message, param=error.param)


class JobControlOut(BaseModel):
    """A control picture as it runs; the picture itself is not told."""

    type: str
    weight: float
    start: float
    end: float
    is_map: bool | None


class JobVideoOut(BaseModel):
    """The video as it runs."""

    num_frames: int
    fps: int
    seconds: float
    format: str
    quality: int
    framewise: bool = Field(description="A picture model paints every frame as a picture.")
    codec: str | None = Field(None, description="null: the usual one of the format.")
    zoom: float | None = None
    pan_x: float | None = None
    pan_y: float | None = None


class JobLoraOut(BaseModel):
    """An adapter as it runs."""

    sha256: str
    name: str
    weight: float


class JobRequestOut(BaseModel):
    """The request as it runs: every blank filled."""

    model: str
    task: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int = Field(description="Of the first picture. Up to 63 bits: more than a JavaScript number keeps.")
    num_images: int
    scheduler: str
    max_sequence_length: int | None
    output_format: str
    output_quality: int
    previews: int
    strength: float | None
    controls: list[JobControlOut]
    loras: list[JobLoraOut]
    video: JobVideoOut | None
    refiner: float | None = Field(description="Part of the steps at which the refiner takes over.")

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
            controls=[
                JobControlOut(
                    type=control.type,
                    weight=control.weight,
                    start=control.start,
                    end=control.end,
                    is_map=control.is_map,
                )
                for control in request.controls
            ],
            video=None
            if request.video is None
            else JobVideoOut(
                num_frames=request.video.num_frames,
                fps=request.video.fps,
                seconds=round(request.video.num_frames / request.video.fps, 3),
                format=request.video.format,
                quality=request.video.quality,
                framewise=request.video.framewise,
                codec=request.video.codec,
                zoom=request.video.zoom,
                pan_x=request.video.pan_x,
                pan_y=request.video.pan_y,
            ),
            loras=[JobLoraOut(sha256=lora.id, name=lora.name, weight=lora.weight) for lora in request.loras],
            refiner=request.refiner,
        )


class ArtifactOut(BaseModel):
    """One finished picture or video and where it lies."""

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

        def still(kind: str) -> str | None:
            return f"{folder}/{artifact.index}/{kind}" if kind in stills else None

        return cls(
            index=artifact.index,
            kind="video" if artifact.kind == "video" else "image",
            url=f"{folder}/{artifact.index}.{EXTENSIONS[artifact.media_type]}",
            thumbnail_url=still("thumbnail"),
            poster_url=still("poster"),
            spritesheet_url=still("spritesheet"),
            media_type=artifact.media_type,
            width=artifact.width,
            height=artifact.height,
            seed=artifact.seed,
            size_bytes=artifact.size_bytes,
        )


class JobOut(BaseModel):
    """One job as it stands. Times are unix seconds."""

    id: str
    kind: Literal["image", "video"]
    status: JobState
    position: int | None = Field(None, description="1: next to begin; null once it has.")
    starts_in_s: float | None = Field(
        None, description="Estimated seconds until it begins; null: it has begun, or there is no telling."
    )
    cached: bool = Field(description="Its pictures were there already, from an earlier equal request.")
    files_expired: bool = Field(description="Its pictures were removed when their time was up.")
    percent: int
    step: int
    steps: int = Field(description="0 until the model has begun.")
    created_at: float
    started_at: float | None
    completed_at: float | None
    generation_s: float | None = Field(description="Seconds of work; waiting is not in it.")
    cancel_requested: bool
    request: JobRequestOut
    warnings: list[WarningOut]
    artifacts: list[ArtifactOut]
    error: JobErrorOut | None

    @classmethod
    def of(cls, job: Job, prefix: str, position: int | None = None, starts_in_s: float | None = None) -> Self:
        """prefix: what stands before /api in links."""
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
            warnings=[WarningOut.of(adjustment) for adjustment in job.warnings],
            artifacts=[ArtifactOut.of(a, job, prefix) for a in job.artifacts if a.kind in RESULTS],
            error=None if job.error is None else JobErrorOut.of(job.error),
        )


class JobAccepted(BaseModel):
    """The answer to a wish: it is stored, and will be worked on whatever dies meanwhile."""

    id: str
    status: JobState
    warnings: list[WarningOut]


class WebhookSecret(BaseModel):
    """The caller's own; whoever has it can forge what we tell."""

    secret: str = Field(examples=["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"])


class JobList(BaseModel):
    """Jobs, newest first."""

    jobs: list[JobOut]
    next_cursor: str | None = Field(description="Ask with it for the next page; null: there is none.")


class JobEnded(BaseModel):
    """What a DELETE did."""

    id: str
    status: Literal["cancelled", "cancelling", "deleted"] = Field(
        description="cancelling: it runs, and stops at its next step."
    )
