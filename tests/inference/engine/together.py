"""A step scheduler for tests of what comes after the choice: it always shares a forward where it can."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from deployments.engine.scheduled_job import ParkedCall
from deployments.engine.step_scheduler import StepScheduler


class Together(StepScheduler):
    """Always the oldest call with all that fit to it; the real one weighs whether that pays."""

    def __init__(self, max_batch_size: int) -> None:
        super().__init__(max_batch_size)
        self._most: dict[Hashable, int] = {}

    def pick(self, waiting: Sequence[ParkedCall], now: float = 0.0, *, observe: bool = True) -> list[int]:
        lead = min(range(len(waiting)), key=lambda i: waiting[i].order)
        key, batch_size = waiting[lead].key, waiting[lead].batch_size
        picked = [lead]
        for i, other in enumerate(waiting):
            fits = i != lead and key is not None and other.key == key
            fits = fits and () not in (other.sizes, waiting[lead].sizes)
            if fits and batch_size + other.batch_size <= self._most.get(key, self.max_batch_size):
                picked.append(i)
                batch_size += other.batch_size
        return picked

    def record_out_of_memory(self, key: Hashable | None, batch_size: int) -> None:
        super().record_out_of_memory(key, batch_size)
        self._most[key] = max(1, min(batch_size, self._most.get(key, batch_size)) // 2)
