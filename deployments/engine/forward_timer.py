"""The seconds that forwards take, measured without waiting for them: wall time on a CPU, events on a GPU."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from deployments.engine.device_time import DeviceTime, Measure
from deployments.engine.scheduled_job import ScheduledJob


@dataclass(frozen=True, slots=True)
class TimedForward:
    """A forward that was computed, or queued on a GPU."""

    module: str
    key: Hashable
    batch_size: int  # that ran, with padding
    jobs: Sequence[ScheduledJob]
    rows: Sequence[int]  # of these jobs, without padding

    def shares(self) -> dict[DeviceTime, float]:
        """By the account of each of its requests, its share of the seconds; the shares add up to 1."""
        total = sum(self.rows)
        shares: dict[DeviceTime, float] = {}
        for job, rows in zip(self.jobs, self.rows, strict=True):  # branches of one request share its account
            account = job.request.device_time
            shares[account] = shares.get(account, 0.0) + rows / total
        return shares


# (forward, seconds, now) of a finished forward
Report = Callable[[TimedForward, float, float], None]


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
        # forwards queued on the GPU
        self._queued: deque[tuple[TimedForward, Measure]] = deque()

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

    def stop(self, forward: TimedForward) -> None:
        """The forward has been computed (CPU) or queued (GPU)."""
        if not self._events:
            self.report(forward, time.perf_counter() - self._began_s)
            return
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        measure = partial(_seconds_between, self._begin, end)
        self._queued.append((forward, measure))
        for device_time, share in forward.shares().items():
            device_time.queue(measure, share)

    def report(self, forward: TimedForward, seconds: float) -> None:
        """A forward has taken so many seconds, which its requests share."""
        for device_time, share in forward.shares().items():
            device_time.add(seconds * share)
        self._report(forward, seconds, self._now())

    def _report_first(self) -> None:
        """Wait for the first queued forward and report it."""
        forward, measure = self._queued.popleft()
        seconds = measure()
        for device_time in forward.shares():
            device_time.settle(measure, seconds)
        self._report(forward, seconds, self._now())


def _seconds_between(begin: Any, end: Any) -> float:
    """The seconds between two CUDA events, once the second has been reached. May be called on any thread."""
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1000
