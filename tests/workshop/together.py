"""A step scheduler for tests of what comes after the choice: it always shares a forward where it can."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from deployments.engine.step_scheduler import StepScheduler, Waiting


class Together(StepScheduler):
    """Always the oldest call with all that fit to it; the real one weighs whether that pays."""

    def __init__(self, max_rows: int) -> None:
        super().__init__(max_rows)
        self._most: dict[Hashable, int] = {}

    def pick(self, waiting: Sequence[Waiting], now: float = 0.0, *, look: bool = True) -> list[int]:
        lead = min(range(len(waiting)), key=lambda i: waiting[i].order)
        key, rows = waiting[lead].key, waiting[lead].rows
        picked = [lead]
        for i, other in enumerate(waiting):
            fits = i != lead and key is not None and other.key == key
            if fits and rows + other.rows <= self._most.get(key, self.max_rows):
                picked.append(i)
                rows += other.rows
        return picked

    def ran_out_of_memory(self, key: Hashable | None, rows: int) -> None:
        super().ran_out_of_memory(key, rows)
        self._most[key] = max(1, min(rows, self._most.get(key, rows)) // 2)
