"""When a waiting job will probably begin: from what recent jobs took and the room there is (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Capacity:
    """What all dispatchers together may run of one model."""

    slots: int
    free: int

    def __add__(self, other: Capacity) -> Capacity:
        return Capacity(self.slots + other.slots, self.free + other.free)


NO_CAPACITY = Capacity(0, 0)


def starts_in_s(position: int, capacity: Capacity, recent_s: Sequence[float]) -> float | None:
    """Seconds until the job at this place in the queue begins; None when nothing is known to tell it by.

    position: 1 is next.  recent_s: what the latest jobs of the model took, each in its slot.
    """
    if position <= capacity.free:
        return 0.0
    if capacity.slots < 1 or not recent_s:
        return None
    return (position - capacity.free) * sum(recent_s) / len(recent_s) / capacity.slots
