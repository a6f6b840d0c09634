"""The seconds that forwards take, measured without waiting for them: wall time on a CPU, events on a GPU."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from deployments.engine.scheduled_job import ScheduledJob

# (module, key, batch size, seconds, jobs, now) of a finished forward
Report = Callable[[str, Hashable, int, float, Sequence[ScheduledJob], float], None]


class ForwardTimer:
    """Measures one forward after the other; on a GPU it also keeps the CPU at most one forward ahead.

    Further ahead, the first call of a new request would wait behind forwards queued long before it.
    """

    def __init__(self, report: Report, device: torch.device, now: Callable[[], float]) -> None:
        """report: called for every forward, on a GPU one or two forwards later."""
        self._report = report
        self._now = now
        self._events = device.type == "cuda"
        self._began_s = 0.0
        self._begin: Any = None
        # forwards queued on the GPU: what to report, and the events of their begin and end
        self._queued: deque[tuple[str, Hashable, int, Sequence[ScheduledJob], Any, Any]] = deque()

    def start(self) -> None:
        """A forward begins."""
        if not self._events:
            self._began_s = time.perf_counter()
            return
        self.wait()
        self._begin = torch.cuda.Event(enable_timing=True)
        self._begin.record()

    def wait(self) -> None:
        """Wait until at most one forward is queued on the GPU.

        To be called before commands are read: after them, a cancel would be heard one forward later.
        """
        while len(self._queued) > 1:
            self._report_first()

    def stop(self, module: str, key: Hashable, batch_size: int, jobs: Sequence[ScheduledJob]) -> None:
        """The forward has been computed (CPU) or queued (GPU)."""
        if not self._events:
            self._report(module, key, batch_size, time.perf_counter() - self._began_s, jobs, self._now())
            return
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        self._queued.append((module, key, batch_size, jobs, self._begin, end))

    def _report_first(self) -> None:
        """Wait for the first queued forward and report it."""
        module, key, batch_size, jobs, begin, end = self._queued.popleft()
        end.synchronize()
        self._report(module, key, batch_size, begin.elapsed_time(end) / 1000, jobs, self._now())
