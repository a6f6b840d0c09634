"""Where a lane's forwards run: on the engine's thread, or on a thread and a CUDA stream of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from deployments.engine.batch_buckets import BucketProver
from deployments.engine.call import ModuleCall
from deployments.engine.fiber import Fiber
from deployments.engine.forward_timer import ForwardTimer, TimedForward
from deployments.engine.lora_rows import run_with_lora_rows
from deployments.engine.memory_meter import MemoryMeter
from deployments.engine.stacking import split, stack


@dataclass(slots=True)
class Forward:
    """One forward for parked calls: what it computes, then what became of it. Its runner sets the results."""

    fibers: Sequence[Fiber]
    calls: Sequence[ModuleCall]  # of these fibers, with equal keys if there are many
    prover: BucketProver | None  # pads to a proven bucket; None: the calls run as they are
    outputs: Sequence[Any] = ()  # one per fiber, unless it failed
    unproven: Sequence[ModuleCall] = ()  # calls that shared a batch size without a proof
    failure: Exception | None = None

    def timed(self, batch_size: int) -> TimedForward:
        """This forward as its timer knows it. batch_size: that ran."""
        first = self.calls[0]
        jobs, rows = [fiber.job for fiber in self.fibers], [call.batch_size for call in self.calls]
        return TimedForward(first.seam.name, first.key, batch_size, jobs, rows)

    def run_measured(self, meter: MemoryMeter | None, lane: Literal["steps", "auxiliary"]) -> int:
        """As `run`, with its memory measured."""
        if meter is None:
            return self.run()
        first, batch_size = self.calls[0], 0
        key = first.seam.name if first.key is None else first.key
        started = meter.start(key, sum([call.batch_size for call in self.calls]))
        try:
            batch_size = self.run()
        finally:
            meter.stop(started, lane, key, batch_size)
        return batch_size

    def run(self) -> int:
        """Set `outputs` and `unproven`; returns the batch size that ran."""
        calls = self.calls
        if self.prover is not None:
            self.outputs, batch_size, self.unproven = self.prover.forward(calls)
            return batch_size
        first = calls[0]
        if len(calls) == 1:
            self.outputs = [run_with_lora_rows([first.lora_set], [first.batch_size], first.run)]
            return first.batch_size
        sizes, lora_sets = [call.batch_size for call in calls], [call.lora_set for call in calls]
        output = run_with_lora_rows(lora_sets, sizes, lambda: first.seam.function(**stack(calls)))
        self.outputs = split(output, sizes)
        self.unproven = calls
        return sum(sizes)


class ForwardRunner(Protocol):
    """Runs one forward at a time. All methods are called on the engine's thread."""

    busy_since: float | None  # time.monotonic() when the current forward began; None on the engine's thread

    @property
    def busy(self) -> bool:
        """Whether a forward has no results yet."""

    def submit(self, forward: Forward) -> None:
        """Run one forward; the runner must not be busy."""

    def collect(self, *, block: bool) -> Forward | None:
        """The forward that was submitted, once it has its results; None if there is none. block: wait."""

    def close(self) -> None:
        """Free the thread, if there is one."""


class InlineRunner:
    """Runs forwards on the engine's thread, while `submit` is called."""

    busy = False
    busy_since: float | None = None

    def __init__(self, timer: ForwardTimer, meter: MemoryMeter | None = None) -> None:
        self._timer = timer
        self._meter = meter
        self._done: Forward | None = None

    def submit(self, forward: Forward) -> None:
        self._done = forward
        self._timer.start()
        try:
            batch_size = forward.run_measured(self._meter, "steps")
        except Exception as error:
            forward.failure = error
        else:
            self._timer.stop(forward.timed(batch_size))

    def collect(self, *, block: bool) -> Forward | None:  # noqa: ARG002 there is nothing to wait for
        forward, self._done = self._done, None
        return forward

    def close(self) -> None:
        """Nothing to free."""


class ThreadRunner:
    """Runs forwards on a thread of its own, on a GPU with a stream of its own."""

    def __init__(
        self,
        device: torch.device,
        timer: ForwardTimer,
        on_done: Callable[[], None],
        meter: MemoryMeter | None = None,
    ) -> None:
        """timer: gets each forward's seconds, in `collect`. on_done: called on the runner's thread when a
        forward can be collected."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="auxiliary")
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._timer = timer
        self._on_done = on_done
        self._meter = meter
        self._running: tuple[Forward, Future[tuple[int, float]]] | None = None
        self.busy_since: float | None = None

    @property
    def busy(self) -> bool:
        return self._running is not None

    def submit(self, forward: Forward) -> None:
        ready = None if self._stream is None else torch.cuda.current_stream().record_event()
        self.busy_since = time.monotonic()
        future = self._thread.submit(self._run, forward, ready)
        self._running = forward, future
        future.add_done_callback(lambda _future: self._on_done())

    def collect(self, *, block: bool) -> Forward | None:
        if self._running is None or not (block or self._running[1].done()):
            return None
        forward, future = self._running
        batch_size, seconds = future.result()
        self._running, self.busy_since = None, None
        if forward.failure is None:
            self._timer.report(forward.timed(batch_size), seconds)
        if self._stream is not None:  # their memory is reused only when the engine's stream has used them
            for tensor in tree_leaves(forward.outputs):
                if isinstance(tensor, Tensor):
                    tensor.record_stream(torch.cuda.current_stream())
        return forward

    def close(self) -> None:
        """End the thread after the current forward."""
        self._thread.shutdown(wait=False)

    def _run(self, forward: Forward, ready: Any) -> tuple[int, float]:
        """The batch size that ran and the seconds it took. Runs on the thread."""
        began_s, batch_size = time.perf_counter(), 0
        try:
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                if self._stream is not None:
                    self._stream.wait_event(ready)
                batch_size = forward.run_measured(self._meter, "auxiliary")
                if self._stream is not None:
                    self._stream.synchronize()
        except Exception as error:
            forward.failure = error
        if forward.failure is not None:
            forward.failure.__traceback__ = None  # it would keep the failed forward's tensors
        return batch_size, time.perf_counter() - began_s
