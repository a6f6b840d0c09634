"""Counters of an engine, for the metrics of its replica (pure: no torch, no clock, no Ray)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2, sqrt

SIDE = 256  # pixels; size classes are multiples of it
MAX_SIDE = 2048


@dataclass(frozen=True, slots=True)
class ForwardLabels:
    """The labels under which forwards are counted."""

    module: str
    model: str
    size: str  # see size_class
    batch_size: int  # with padding


class EngineStats:
    """Counters that only grow. Written by the engine's thread, read by any."""

    def __init__(self) -> None:
        self._forwards: dict[tuple[str, tuple[str, str], int], list[float]] = {}  # count, seconds
        self.steps = 0  # denoising steps finished, of all requests
        self.requests = 0  # ended, of any kind
        self.failures: dict[str, int] = {}  # by kind of error
        self.halved_batches = 0  # joint forwards that ran out of memory and were run in halves
        self.device_failures = 0  # that ended the engine: 0 or 1
        self.unproven_forwards = 0  # joint forwards of a batch size that is not proven to change no bit
        self.preempted = 0  # requests that other replicas continue, because this one stopped

    def record_forward(self, module: str, labels: tuple[str, str], batch_size: int, seconds: float) -> None:
        """One forward. labels: model and size of the first of its requests."""
        key = (module, labels, batch_size)
        known = self._forwards.get(key)
        if known is None:
            self._forwards[key] = [1, seconds]
        else:
            known[0] += 1
            known[1] += seconds

    @property
    def progress(self) -> int:
        """Grows with every forward of every module."""
        return int(sum(number for number, _ in self._forwards.copy().values()))

    def record_failure(self, kind: str) -> None:
        self.failures[kind] = self.failures.get(kind, 0) + 1

    @property
    def forwards(self) -> dict[ForwardLabels, tuple[int, float]]:
        """How many, and the seconds they took together."""
        return {
            ForwardLabels(module, model, size, batch_size): (int(number), seconds)
            for (module, (model, size), batch_size), (number, seconds) in self._forwards.copy().items()
        }


def size_class(width: int, height: int, num_frames: int | None = None) -> str:
    """The side of the square that holds as many pixels, rounded up to 256; of a video with the frames,
    rounded up to a power of two: "512", "768x64"."""
    side = SIDE * ceil(sqrt(width * height) / SIDE)
    side_label = str(side) if side <= MAX_SIDE else "larger"
    return side_label if num_frames is None else f"{side_label}x{2 ** ceil(log2(num_frames))}"
