"""Pictures a day: reserved when a job is accepted, settled when it ends (pure).

The reservation is a field of the job's own record and changes in the same MULTI/EXEC as its state, so
whoever dies in between, a picture is counted once or given back once. Days are UTC's, by the store's clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from deployments.protocol.errors import QuotaExceeded

DAY_S = 86_400
KEPT_S = 10 * DAY_S  # of an owner's counts; a job's record lives seven days


@dataclass(frozen=True, slots=True)
class Charge:
    """What a job has reserved, or was settled at."""

    day: str  # 2026-11-21
    images: int

    @classmethod
    def parse(cls, text: str) -> Charge:
        day, _, images = text.partition(" ")
        return cls(day, int(images))

    def __str__(self) -> str:
        return f"{self.day} {self.images}"


def day_of(now_us: int) -> str:
    """The UTC day of a moment in microseconds."""
    return datetime.fromtimestamp(now_us / 1e6, UTC).date().isoformat()


def reserve(images_per_day: int | None, used: Mapping[str, str], images: int, now_us: int) -> Charge | None:
    """What a job for so many pictures reserves; None: this owner has no quota.

    used: pictures by day, as stored. Raises QuotaExceeded, which tells when the next day begins.
    """
    if images_per_day is None:
        return None
    day = day_of(now_us)
    left = max(0, images_per_day - int(used.get(day, 0)))
    if images > left:
        raise QuotaExceeded(
            f"{images} pictures are more than the {left} left of your {images_per_day} today; "
            "ask for fewer, or come back after midnight UTC",
            param="num_images",
            retry_after_s=DAY_S - now_us / 1e6 % DAY_S,
        )
    return Charge(day, images)


def refund(charge: Charge | None, delivered: int) -> int:
    """How many reserved pictures the ended job gives back."""
    return 0 if charge is None else max(0, charge.images - delivered)


def old_days(used: Mapping[str, str], now_us: int) -> list[str]:
    """The days whose counts nothing needs any more."""
    oldest = day_of(now_us - KEPT_S * 1_000_000)
    return [day for day in used if day < oldest]
