"""How long forwards take, without waiting for them: wall time on a CPU, events on a GPU."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from deployments.engine.step_scheduler import ScheduledJob

# (module, key, rows, seconds, jobs, now) of a finished forward
Report = Callable[[str, Hashable, int, float, Sequence[ScheduledJob], float], None]


class ForwardTimer:
    """Measures one forward after the other; on a GPU it also keeps the CPU at most one forward ahead.

    Further ahead, a request that arrives would wait behind forwards that were queued long ago.
    """

    def __init__(self, report: Report, device: torch.device, now: Callable[[], float]) -> None:
        self._report = report
        self._now = now
        self._events = device.type == "cuda"
        self._began_s = 0.0
        self._begin: Any = None
        self._running: deque[tuple[str, Hashable, int, Sequence[ScheduledJob], Any, Any]] = (
            deque()
        )  # with both events

    def start(self) -> None:
        """A forward begins."""
        if not self._events:
            self._began_s = time.perf_counter()
            return
        while len(self._running) > 1:
            self._collect()
        self._begin = torch.cuda.Event(enable_timing=True)
        self._begin.record()

    def stop(self, module: str, key: Hashable, batch_size: int, jobs: Sequence[ScheduledJob]) -> None:
        """It has been computed (CPU) or queued (GPU)."""
        if not self._events:
            self._report(module, key, batch_size, time.perf_counter() - self._began_s, jobs, self._now())
            return
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        self._running.append((module, key, batch_size, jobs, self._begin, end))

    def _collect(self) -> None:
        module, key, batch_size, jobs, begin, end = self._running.popleft()
        end.synchronize()
        self._report(module, key, batch_size, begin.elapsed_time(end) / 1000, jobs, self._now())
