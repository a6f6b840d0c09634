"""What jobs used: device seconds, files and cost, counted once when a job ends (pure).

All amounts are whole numbers, so that sums are exact: microseconds, pixels, bytes, millionths of a currency.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Literal, Self, get_args

from serve_app.jobs.job import Job

MICRO = 1_000_000
GroupBy = Literal["day", "user", "key", "model"]
GROUPS: tuple[GroupBy, ...] = get_args(GroupBy)


@dataclass(frozen=True, slots=True)
class Amounts:
    """What one job, or several, used."""

    jobs: int = 0  # ended, in any way
    images: int = 0  # finished files
    videos: int = 0
    pixels: int = 0  # of these, of all frames of a video
    bytes: int = 0  # of all files, thumbnails too
    device_us: int = 0
    cost_micros: int = 0

    def __add__(self, other: Amounts) -> Amounts:
        return Amounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


AMOUNTS = tuple(field.name for field in fields(Amounts))


@dataclass(frozen=True, slots=True)
class UsageAccount:
    """Whose usage is counted together on one day."""

    user: str  # owner of the jobs: the id of a user, or "local"
    key: str  # prefix of the API key that submitted them; empty for none
    model: str

    def field(self, amount: str) -> str:
        """Name of the field with one amount, in the hash of a day."""
        return json.dumps([self.user, self.key, self.model, amount])

    @classmethod
    def parse(cls, field: str) -> tuple[Self, str]:
        """The account and the amount of such a name."""
        user, key, model, amount = json.loads(field)
        return cls(user, key, model), amount


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Amounts of one group; what is not grouped by is None."""

    day: str | None  # 2026-12-01, UTC, on which the jobs ended
    user: str | None
    key: str | None
    model: str | None
    amounts: Amounts


def account_of(job: Job) -> UsageAccount:
    """The account that pays for the job."""
    return UsageAccount(job.owner, job.api_key, job.request.model)


def amounts_of(job: Job) -> Amounts:
    """What an ended job used; a job that copied the files of an earlier one used no device."""
    made = [artifact for artifact in job.artifacts if artifact.kind in ("image", "video")]
    frames = 1 if job.request.video is None else job.request.video.num_frames
    return Amounts(
        jobs=1,
        images=sum(artifact.kind == "image" for artifact in made),
        videos=sum(artifact.kind == "video" for artifact in made),
        pixels=sum(artifact.width * artifact.height * frames for artifact in made),
        bytes=sum(artifact.size_bytes for artifact in job.artifacts),
        device_us=job.device_us,
        cost_micros=cost_micros(job),
    )


def cost_micros(job: Job) -> int:
    """What the job costs, in millionths: its device seconds at the price when it was accepted."""
    return round(job.device_us * job.price_per_device_second)


def grouped(rows: Iterable[UsageRow], by: Sequence[GroupBy]) -> list[UsageRow]:
    """The sums of rows that agree in these groups, sorted by them."""
    sums: dict[tuple[str | None, str | None, str | None, str | None], Amounts] = {}
    for row in rows:
        day, user, key, model = (getattr(row, name) if name in by else None for name in GROUPS)
        group = (day, user, key, model)
        sums[group] = sums.get(group, Amounts()) + row.amounts
    ordered = sorted(sums.items(), key=lambda item: tuple(part or "" for part in item[0]))
    return [UsageRow(*group, amounts) for group, amounts in ordered]


def month_of(day: str) -> str:
    """The month of a day: 2026-12-01 is in 2026-12."""
    return day[:7]
