"""Quota of images per day: reserved when a job is accepted, settled when it ends (pure).

The reservation is a field of the job's record and changes in the same MULTI/EXEC as the job's state: an image
is counted once and refunded once even when a process dies in between. Days are UTC days of the store's clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from deployments.protocol.errors import QuotaExceeded

DAY_S = 86_400
KEPT_S = 10 * DAY_S  # lifetime of an owner's counts; the record of a job lives seven days


@dataclass(frozen=True, slots=True)
class Charge:
    """The images that a job has reserved, or was settled at."""

    day: str  # 2026-11-21
    images: int

    @classmethod
    def parse(cls, text: str) -> Charge:
        day, _, images = text.partition(" ")
        return cls(day, int(images))

    def __str__(self) -> str:
        return f"{self.day} {self.images}"


def day_of(now_us: int) -> str:
    """The UTC day of a unix time in microseconds."""
    return datetime.fromtimestamp(now_us / 1e6, UTC).date().isoformat()


def reserve(images_per_day: int | None, used: Mapping[str, str], images: int, now_us: int) -> Charge | None:
    """The reservation of a job for so many images; None: this owner has no quota.

    used: images by day, as stored. Raises QuotaExceeded with the time until the next day.
    """
    if images_per_day is None:
        return None
    day = day_of(now_us)
    left = max(0, images_per_day - int(used.get(day, 0)))
    if images > left:
        raise QuotaExceeded(
            f"{images} images are more than the {left} left of your {images_per_day} today; "
            "request fewer, or try again after midnight UTC",
            param="num_images",
            retry_after_s=DAY_S - now_us / 1e6 % DAY_S,
        )
    return Charge(day, images)


def refund(charge: Charge | None, delivered: int) -> int:
    """Number of reserved images that the ended job does not use."""
    return 0 if charge is None else max(0, charge.images - delivered)


def old_days(used: Mapping[str, str], now_us: int) -> list[str]:
    """The days whose counts are no longer needed."""
    oldest = day_of(now_us - KEPT_S * 1_000_000)
    return [day for day in used if day < oldest]
