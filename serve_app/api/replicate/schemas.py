"""Bodies and answers of predictions."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from serve_app.api.schemas.body import NullableFields
from serve_app.api.schemas.files import ImageBytes
from serve_app.api.schemas.job import JobOut, WarningOut
from serve_app.api.schemas.numbers import Int, Seed
from serve_app.jobs.job import Job, JobState

STATES: Mapping[JobState, str] = {
    JobState.queued: "starting",
    JobState.processing: "processing",
    JobState.completed: "succeeded",
    JobState.failed: "failed",
    JobState.cancelled: "canceled",
}
BAR = 10  # characters of a progress bar


class PredictionInput(NullableFields):
    """The inputs that Replicate's models for images share; others are ignored, with a warning."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, protected_namespaces=())

    prompt: str
    negative_prompt: str = ""
    width: Int | None = Field(None, ge=1, le=16_384)
    height: Int | None = Field(None, ge=1, le=16_384)
    aspect_ratio: str | None = Field(None, pattern=r"^([0-9]{1,3}:[0-9]{1,3}|custom|match_input_image)$")
    num_outputs: Int = Field(1, ge=1, le=16, validation_alias=AliasChoices("num_outputs", "num_images"))
    num_inference_steps: Int | None = Field(
        None, ge=1, le=1000, validation_alias=AliasChoices("num_inference_steps", "steps")
    )
    guidance_scale: float | None = Field(
        None, ge=0, le=100, validation_alias=AliasChoices("guidance_scale", "guidance")
    )
    seed: Seed = None
    scheduler: str | None = Field(None, max_length=100)
    image: ImageBytes | None = Field(None, repr=False)
    mask: ImageBytes | None = Field(None, repr=False, description="White is drawn anew.")
    prompt_strength: float | None = Field(
        None, ge=0, le=1, validation_alias=AliasChoices("prompt_strength", "strength")
    )
    output_format: str | None = Field(None, pattern="^(png|jpg|jpeg|webp)$")
    output_quality: Int = Field(95, ge=0, le=100)


class PredictionBody(NullableFields):
    """Body of POST /v1/models/{owner}/{name}/predictions."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=())

    input: PredictionInput
    webhook: str | None = Field(None, max_length=2048, repr=False)
    webhook_events_filter: list[str] | None = Field(None, max_length=10)


class VersionBody(PredictionBody):
    """Body of POST /v1/predictions."""

    version: str = Field(max_length=300, description="A model: owner/name, owner/name:version, or its id.")


class Prediction(BaseModel):
    """A job as Replicate shows it. Times are ISO 8601."""

    id: str
    model: str
    version: str
    status: str = Field(description="starting, processing, succeeded, failed or canceled.")
    input: dict[str, Any]
    output: list[str] | None
    logs: str = Field(description="Warnings, and a line that replicate reads the progress from.")
    error: str | None
    metrics: dict[str, float]
    created_at: str
    started_at: str | None
    completed_at: str | None
    urls: dict[str, str]

    @classmethod
    def of(cls, job: Job, address: str) -> Self:
        """address: base of the links."""
        ended = job.state is JobState.completed
        url = f"{address}/v1/predictions/{job.id}"
        return cls(
            id=job.id,
            model=job.request.model,
            version=job.request.model,
            status=STATES[job.state],
            input=_input(job),
            output=[one.url for one in JobOut.of(job, address).artifacts] if ended else None,
            logs=_logs(job),
            error=None if job.error is None else job.error.message,
            metrics={} if job.generation_s is None else {"predict_time": job.generation_s},
            created_at=_iso(job.created_at),
            started_at=None if job.started_at is None else _iso(job.started_at),
            completed_at=None if job.completed_at is None else _iso(job.completed_at),
            urls={"get": url, "cancel": f"{url}/cancel"},
        )


class PredictionPage(BaseModel):
    """Predictions, newest first."""

    previous: str | None = None
    next: str | None
    results: list[Prediction]


def _input(job: Job) -> dict[str, Any]:
    """What was used, without images."""
    request = job.request
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "width": request.width,
        "height": request.height,
        "num_outputs": request.num_images,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "seed": request.seed,
        "scheduler": request.scheduler,
    }


def _logs(job: Job) -> str:
    lines = [f"warning: {warning.message}" for warning in WarningOut.all_of(job)]
    if job.steps:
        filled = BAR * job.percent // 100
        bar = "#" * filled + " " * (BAR - filled)
        lines.append(f"{job.percent}%|{bar}| {job.step}/{job.steps}")
    return "\n".join(lines)


def _iso(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat().replace("+00:00", "Z")
