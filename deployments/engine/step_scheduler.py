"""Whose step runs next, and with whom (pure: no torch, no clock)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    """One parked call as the scheduler sees it."""

    key: Hashable | None  # None shares a forward with nobody
    rows: int
    parked_at: int  # smaller is earlier


class StepScheduler:
    """First come, first served: the call that waits longest leads, and all that fit it come along.

    So no call waits for more than one forward of every other group. `max_rows` caps a forward; a key
    that ran out of memory has its own, smaller cap from then on.
    """

    def __init__(self, max_rows: int) -> None:
        if max_rows < 1:
            raise ValueError("max_rows must be at least 1")
        self._max_rows = max_rows
        self._caps: dict[Hashable, int] = {}

    def pick(self, waiting: Sequence[Waiting]) -> list[int]:
        """Indices of the calls for the next forward, earliest first; empty only if nothing waits."""
        if not waiting:
            return []
        order = sorted(range(len(waiting)), key=lambda i: waiting[i].parked_at)
        lead = waiting[order[0]]
        if lead.key is None:
            return [order[0]]
        room = self._caps.get(lead.key, self._max_rows) - lead.rows
        picked = [order[0]]
        for i in order[1:]:
            if waiting[i].key == lead.key and waiting[i].rows <= room:
                picked.append(i)
                room -= waiting[i].rows
        return picked

    def ran_out_of_memory(self, key: Hashable | None, rows: int) -> None:
        """Remember that `rows` rows of `key` do not fit the device."""
        if key is not None:
            self._caps[key] = max(1, min(rows, self._caps.get(key, rows)) // 2)
