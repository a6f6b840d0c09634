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
class Outcome:
    """What became of one forward: its outputs, or why it failed."""

    fibers: Sequence[Fiber]
    outputs: list[Any]
    rows: int
    seconds: float
    failure: Exception | None


class Aside:
    """A thread that runs one forward at a time, with a stream of its own on a GPU.

    All methods are the engine's, on its thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="aside")
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._at_work: Future[Outcome] | None = None
        self._fibers: Sequence[Fiber] = ()
        self.since: float | None = None  # time.monotonic() when the forward at hand was given

    @property
    def free(self) -> bool:
        return self._at_work is None

    def has(self, fiber: Fiber) -> bool:
        """Whether this fiber's call is being computed here."""
        return fiber in self._fibers

    def give(self, fibers: Sequence[Fiber], forward: Forward) -> None:
        """Begin a forward for these parked fibers; the place must be free."""
        ready = None if self._stream is None else torch.cuda.current_stream().record_event()
        self._fibers, self.since = fibers, time.monotonic()
        self._at_work = self._thread.submit(self._run, fibers, forward, ready)

    def take(self, *, patiently: bool) -> Outcome | None:
        """The outcome, if there is one by now; patiently: wait for the forward at hand."""
        if self._at_work is None or not (patiently or self._at_work.done()):
            return None
        wait([self._at_work])
        outcome = self._at_work.result()
        self._at_work, self._fibers, self.since = None, (), None
        if self._stream is not None:  # their memory may be reused once the engine's stream is done with it
            for tensor in _tensors(outcome.outputs):
                tensor.record_stream(torch.cuda.current_stream())
        return outcome

    def close(self) -> None:
        """End the thread after the forward at hand."""
        self._thread.shutdown(wait=False)

    def _run(self, fibers: Sequence[Fiber], forward: Forward, ready: Any) -> Outcome:
        """On the thread aside."""
        began, rows = time.perf_counter(), 0
        outputs: list[Any] = []
        failure: Exception | None = None
        try:
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                if self._stream is not None:
                    self._stream.wait_event(ready)
                outputs, rows = forward()
                if self._stream is not None:
                    self._stream.synchronize()
        except Exception as error:
            failure = error
        if failure is not None:
            failure.__traceback__ = None  # it would keep the failed forward's tensors
        return Outcome(fibers, outputs, rows, time.perf_counter() - began, failure)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
