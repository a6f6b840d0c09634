"""A place of its own for forwards that are no steps: a VAE's encoding and decoding stall nobody there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deployments.engine.fiber import Fiber

Forward = Callable[[], tuple[list[Any], int]]  # one output per call, and the rows that ran


@dataclass(frozen=True, slots=True)
class ForwardOutcome:
    """What became of one forward: its outputs, or why it failed."""

    fibers: Sequence[Fiber]
    outputs: list[Any]
    batch_size: int
    seconds: float
    failure: Exception | None


class AuxiliaryLane:
    """A thread that runs one forward at a time, with a stream of its own on a GPU.

    All methods are the engine's, on its thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="auxiliary")
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._running: Future[ForwardOutcome] | None = None
        self._fibers: Sequence[Fiber] = ()
        self.busy_since: float | None = None  # time.monotonic() when the forward at hand was given

    @property
    def is_free(self) -> bool:
        return self._running is None

    def is_running(self, fiber: Fiber) -> bool:
        """Whether this fiber's call is being computed here."""
        return fiber in self._fibers

    def submit(self, fibers: Sequence[Fiber], forward: Forward) -> None:
        """Begin a forward for these parked fibers; the place must be free."""
        ready = None if self._stream is None else torch.cuda.current_stream().record_event()
        self._fibers, self.busy_since = fibers, time.monotonic()
        self._running = self._thread.submit(self._run, fibers, forward, ready)

    def collect(self, *, block: bool) -> ForwardOutcome | None:
        """The outcome, if there is one by now; patiently: wait for the forward at hand."""
        if self._running is None or not (block or self._running.done()):
            return None
        wait([self._running])
        outcome = self._running.result()
        self._running, self._fibers, self.busy_since = None, (), None
        if self._stream is not None:  # their memory may be reused once the engine's stream is done with it
            for tensor in _tensors(outcome.outputs):
                tensor.record_stream(torch.cuda.current_stream())
        return outcome

    def close(self) -> None:
        """End the thread after the forward at hand."""
        self._thread.shutdown(wait=False)

    def _run(self, fibers: Sequence[Fiber], forward: Forward, ready: Any) -> ForwardOutcome:
        """On the thread aside."""
        began, batch_size = time.perf_counter(), 0
        outputs: list[Any] = []
        failure: Exception | None = None
        try:
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                if self._stream is not None:
                    self._stream.wait_event(ready)
                outputs, batch_size = forward()
                if self._stream is not None:
                    self._stream.synchronize()
        except Exception as error:
            failure = error
        if failure is not None:
            failure.__traceback__ = None  # it would keep the failed forward's tensors
        return ForwardOutcome(fibers, outputs, batch_size, time.perf_counter() - began, failure)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
