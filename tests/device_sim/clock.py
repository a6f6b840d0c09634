"""Streams and events of the simulated device, ordered by vector clocks.

A kernel is a number on its stream. A clock says, by stream, up to which number everything has finished: for a
stream, before its next kernel starts; for the host, when a call that waits has returned. Two kernels on
different streams race where neither clock contains the other.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

CUDA = torch.device("cuda", 0)


class Clock(dict[int, int]):
    """By stream number: the last kernel that is known to have finished."""

    def merge(self, other: Mapping[int, int]) -> None:
        """Know what `other` knows as well."""
        for stream, kernel in other.items():
            if kernel > self.get(stream, 0):
                self[stream] = kernel

    def covers(self, stream: int, kernel: int) -> bool:
        """Whether this kernel is known to have finished."""
        return self.get(stream, 0) >= kernel


launched = Clock()  # on all streams so far
host = Clock()  # one per process, as torch.cuda's state is: what the host knows to have finished


class SimStream:
    """torch.cuda.Stream. Kernels of one stream run in order; `busy_ms` is the modelled time of all so far."""

    _count = 0
    on_wait: Callable[[], None] = staticmethod(lambda: None)  # called when the host waits for a stream

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.number = SimStream._count
        SimStream._count += 1
        self.device = CUDA
        self.priority = priority
        self.kernels = 0
        self.clock = Clock()
        self.busy_ms = 0.0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """The lowest and the highest priority, as on a data centre GPU."""
        return 0, -5

    def launch(self, seconds: float) -> int:
        """Queue a kernel that takes so long; returns its number."""
        self.clock.merge(host)
        self.kernels += 1
        self.clock[self.number] = launched[self.number] = self.kernels
        self.busy_ms += seconds * 1e3
        return self.kernels

    def record_event(self, event: SimEvent | None = None) -> SimEvent:
        event = event or SimEvent()
        event.record(self)
        return event

    def wait_event(self, event: SimEvent) -> None:
        self.clock.merge(event.clock)
        self.busy_ms = max(self.busy_ms, event.at_ms)

    def wait_stream(self, other: SimStream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        host.merge(self.clock)
        SimStream.on_wait()

    def query(self) -> bool:
        host.merge(self.clock)
        return True

    def __enter__(self) -> SimStream:
        _thread.entered = [*getattr(_thread, "entered", ()), getattr(_thread, "stream", None)]
        _thread.stream = self
        return self

    def __exit__(self, *_: object) -> None:
        _thread.stream = _thread.entered.pop()


class SimEvent:
    """torch.cuda.Event, in the modelled time of its stream."""

    def __init__(self, **_: Any) -> None:
        self.clock = Clock()
        self.at_ms = 0.0

    def record(self, stream: SimStream | None = None) -> None:
        stream = stream or current_stream()
        stream.clock.merge(host)
        self.clock, self.at_ms = Clock(stream.clock), stream.busy_ms

    def wait(self, stream: SimStream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        host.merge(self.clock)

    def query(self) -> bool:
        self.synchronize()
        return True

    def elapsed_time(self, end: SimEvent) -> float:
        return max(end.at_ms - self.at_ms, 1e-3)


_thread = threading.local()
DEFAULT_STREAM = SimStream()


def current_stream(_device: Any = None) -> SimStream:
    """The calling thread's stream."""
    return getattr(_thread, "stream", None) or DEFAULT_STREAM


def set_stream(stream: SimStream) -> None:
    """torch.cuda.set_stream."""
    _thread.stream = stream


@contextlib.contextmanager
def use_stream(stream: SimStream | None) -> Iterator[None]:
    """torch.cuda.stream; None changes nothing."""
    if stream is None:
        yield
        return
    with stream:
        yield
