"""Where a lane's forwards run: on the engine's thread, or on a thread and a CUDA stream of their own."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from deployments.engine.batch_buckets import BucketProver
from deployments.engine.call import ModuleCall
from deployments.engine.fiber import Fiber
from deployments.engine.forward_timer import ForwardTimer, Report
from deployments.engine.lora_rows import run_with_lora_rows
from deployments.engine.stacking import split, stack

SetBuckets = Callable[[Hashable, Sequence[int]], None]


@dataclass(slots=True)
class Forward:
    """What one forward computes. Not frozen, as ForwardOutcome: that costs 1 us per step."""

    fibers: Sequence[Fiber]
    calls: Sequence[ModuleCall]  # of these fibers, with equal keys if there are many
    prover: BucketProver | None  # pads to a proven bucket; None: the calls run as they are

    def run(self) -> tuple[list[Any], int]:
        """One output per call, and the batch size that ran."""
        calls = self.calls
        if self.prover is not None:
            return self.prover.forward(calls, stack(calls))
        first, sizes = calls[0], [call.batch_size for call in calls]
        lora_sets = [call.lora_set for call in calls]
        if len(calls) == 1:
            return [run_with_lora_rows(lora_sets, sizes, first.run)], sizes[0]
        output = run_with_lora_rows(lora_sets, sizes, lambda: first.seam.function(**stack(calls)))
        return split(output, sizes), sum(sizes)


@dataclass(slots=True)
class ForwardOutcome:
    """What became of one forward: one output per fiber, or the error."""

    fibers: Sequence[Fiber]
    outputs: list[Any]
    failure: Exception | None


class ForwardRunner(Protocol):
    """Runs one forward at a time. All methods are called on the engine's thread."""

    busy_since: float | None  # time.monotonic() when the current forward began; None on the engine's thread

    @property
    def busy(self) -> bool:
        """Whether a forward has no outcome yet."""

    def submit(self, forward: Forward) -> None:
        """Run one forward; the runner must not be busy."""

    def collect(self, *, block: bool) -> ForwardOutcome | None:
        """The outcome of the last forward, once; None if there is none. block: wait for it."""

    def deferred(self, set_buckets: SetBuckets) -> SetBuckets:
        """A function that a prover may call while its forward runs."""

    def close(self) -> None:
        """Free the thread, if there is one."""


class InlineRunner:
    """Runs forwards on the engine's thread, while `submit` is called."""

    busy = False
    busy_since: float | None = None

    def __init__(self, timer: ForwardTimer) -> None:
        self._timer = timer
        self._outcome: ForwardOutcome | None = None

    def submit(self, forward: Forward) -> None:
        outputs: list[Any] = []
        failure: Exception | None = None
        self._timer.start()
        try:
            outputs, batch_size = forward.run()
        except Exception as error:
            failure = error
        else:
            first = forward.calls[0]
            self._timer.stop(first.seam.name, first.key, batch_size, [fiber.job for fiber in forward.fibers])
        self._outcome = ForwardOutcome(forward.fibers, outputs, failure)

    def collect(self, *, block: bool) -> ForwardOutcome | None:  # noqa: ARG002 there is nothing to wait for
        outcome, self._outcome = self._outcome, None
        return outcome

    def deferred(self, set_buckets: SetBuckets) -> SetBuckets:
        return set_buckets

    def close(self) -> None:
        """Nothing to free."""


class ThreadRunner:
    """Runs forwards on a thread of its own, on a GPU with a stream of its own."""

    def __init__(
        self,
        device: torch.device,
        report: Report,
        now: Callable[[], float],
        on_done: Callable[[], None],
    ) -> None:
        """report: called on the engine's thread, in `collect`. on_done: called on the runner's thread when a
        forward can be collected."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="auxiliary")
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._report = report
        self._now = now
        self._on_done = on_done
        self._running: Future[tuple[ForwardOutcome, int, float]] | None = None
        self._buckets: deque[tuple[SetBuckets, Hashable, Sequence[int]]] = deque()  # found on the thread
        self.busy_since: float | None = None

    @property
    def busy(self) -> bool:
        return self._running is not None

    def submit(self, forward: Forward) -> None:
        ready = None if self._stream is None else torch.cuda.current_stream().record_event()
        self.busy_since = time.monotonic()
        self._running = self._thread.submit(self._run, forward, ready)
        self._running.add_done_callback(lambda _future: self._on_done())

    def collect(self, *, block: bool) -> ForwardOutcome | None:
        if self._running is None or not (block or self._running.done()):
            return None
        wait([self._running])
        outcome, batch_size, seconds = self._running.result()
        self._running, self.busy_since = None, None
        while self._buckets:
            set_buckets, key, buckets = self._buckets.popleft()
            set_buckets(key, buckets)
        if outcome.failure is None:
            call = outcome.fibers[0].call
            assert call is not None
            jobs = [fiber.job for fiber in outcome.fibers]
            self._report(call.seam.name, call.key, batch_size, seconds, jobs, self._now())
        if self._stream is not None:  # their memory is reused only when the engine's stream has used them
            for tensor in tree_leaves(outcome.outputs):
                if isinstance(tensor, Tensor):
                    tensor.record_stream(torch.cuda.current_stream())
        return outcome

    def deferred(self, set_buckets: SetBuckets) -> SetBuckets:
        return lambda key, buckets: self._buckets.append((set_buckets, key, buckets))

    def close(self) -> None:
        """End the thread after the current forward."""
        self._thread.shutdown(wait=False)

    def _run(self, forward: Forward, ready: Any) -> tuple[ForwardOutcome, int, float]:
        """The outcome, the batch size that ran and the seconds it took. Runs on the thread."""
        began_s, batch_size = time.perf_counter(), 0
        outputs: list[Any] = []
        failure: Exception | None = None
        try:
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                if self._stream is not None:
                    self._stream.wait_event(ready)
                outputs, batch_size = forward.run()
                if self._stream is not None:
                    self._stream.synchronize()
        except Exception as error:
            failure = error
        if failure is not None:
            failure.__traceback__ = None  # it would keep the failed forward's tensors
        outcome = ForwardOutcome(forward.fibers, outputs, failure)
        return outcome, batch_size, time.perf_counter() - began_s
