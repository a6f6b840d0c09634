"""How long forwards take, without waiting for them: wall time on a CPU, events on a GPU."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from deployments.engine.step_scheduler import Job

# (module, key, rows, seconds, jobs, now) of a finished forward
Report = Callable[[str, Hashable, int, float, Sequence[Job], float], None]


class Stopwatch:
    """Measures one forward after the other; on a GPU it also keeps the CPU at most one forward ahead.

    Further ahead, a request that arrives would wait behind forwards that were queued long ago.
    """

    def __init__(self, report: Report, device: torch.device, now: Callable[[], float]) -> None:
        self._report = report
        self._now = now
        self._events = device.type == "cuda"
        self._began_s = 0.0
        self._begin: Any = None
        self._running: deque[tuple[str, Hashable, int, Sequence[Job], Any, Any]] = deque()  # with both events

    def start(self) -> None:
        """A forward begins."""
        if not self._events:
            self._began_s = time.perf_counter()
            return
        while len(self._running) > 1:
            self._collect()
        self._begin = torch.cuda.Event(enable_timing=True)
        self._begin.record()

    def stop(self, module: str, key: Hashable, rows: int, jobs: Sequence[Job]) -> None:
        """It has been computed (CPU) or queued (GPU)."""
        if not self._events:
            self._report(module, key, rows, time.perf_counter() - self._began_s, jobs, self._now())
            return
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        self._running.append((module, key, rows, jobs, self._begin, end))

    def _collect(self) -> None:
        module, key, rows, jobs, begin, end = self._running.popleft()
        end.synchronize()
        self._report(module, key, rows, begin.elapsed_time(end) / 1000, jobs, self._now())
