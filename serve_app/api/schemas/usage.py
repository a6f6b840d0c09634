"""Usage as the native dialect shows it."""

from typing import Self

from pydantic import BaseModel, Field

from serve_app.jobs.job import Job
from serve_app.jobs.usage import MICRO, Amounts, UsageRow, amounts_of


class JobUsageOut(BaseModel):
    """What one job used so far."""

    device_s: float = Field(
        description="Its share, by batch rows, of the seconds of every forward, of all attempts. A result "
        "copied from an earlier equal request used none."
    )
    images: int
    videos: int
    megapixels: float = Field(description="Of finished images, and of all frames of videos.")
    bytes: int = Field(description="Of all files, thumbnails too.")
    cost: float = Field(description="device_s at the model's price_per_device_second, 0 without a price.")

    @classmethod
    def of(cls, job: Job) -> Self:
        return cls(**_shown(amounts_of(job)))


class UsageRowOut(BaseModel):
    """The sums of one group; what is not grouped by is null."""

    day: str | None = Field(description="UTC day on which the jobs ended.", examples=["2026-12-01"])
    user: str | None = Field(description="Id of the user, or local for the installation's own key.")
    key: str | None = Field(description="Prefix of the API key, empty for none.")
    model: str | None
    jobs: int = Field(description="That ended: completed, failed or cancelled.")
    images: int
    videos: int
    megapixels: float
    bytes: int
    device_s: float
    cost: float

    @classmethod
    def of(cls, row: UsageRow) -> Self:
        amounts = row.amounts
        return cls(
            day=row.day,
            user=row.user,
            key=row.key,
            model=row.model,
            jobs=amounts.jobs,
            **_shown(amounts),
        )


class UsageOut(BaseModel):
    """Usage by group, sorted by day, user, key and model."""

    usage: list[UsageRowOut]


def _shown(amounts: Amounts) -> dict[str, float]:
    """The amounts in units for people."""
    return {
        "images": amounts.images,
        "videos": amounts.videos,
        "megapixels": amounts.pixels / MICRO,
        "bytes": amounts.bytes,
        "device_s": amounts.device_us / MICRO,
        "cost": amounts.cost_micros / MICRO,
    }
