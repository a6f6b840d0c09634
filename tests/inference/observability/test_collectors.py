"""Metrics of the inference layer: what the engine counts, and how it is reported to Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deployments.engine.engine import Engine
from deployments.engine.engine_stats import EngineStats, ForwardLabels, size_class
from deployments.engine.intercept import intercept
from deployments.engine.proof_state import ProofState
from deployments.engine.scheduled_job import ScheduledJob
from deployments.engine.step_scheduler import StepScheduler
from deployments.engine.work import Emit
from deployments.engine.worker import Worker
from deployments.observability import collectors
from deployments.observability.declarations import INFERENCE_METRICS
from deployments.observability.metrics import Reporter, Sample
from deployments.protocol import log_context
from deployments.protocol.errors import NotFinite
from deployments.protocol.events import Step
from deployments.protocol.log_context import LogContext
from tests.patience import patience


@pytest.mark.parametrize(
    ("width", "height", "frames", "expected"),
    [
        (128, 128, None, "256"),
        (512, 512, None, "512"),
        (512, 528, None, "768"),
        (1024, 1024, None, "1024"),
        (1536, 640, None, "1024"),
        (4096, 4096, None, "larger"),
        (832, 480, 81, "768x128"),
        (832, 480, 1, "768x1"),
    ],
)
def test_there_are_few_size_classes(width: int, height: int, frames: int | None, expected: str) -> None:
    assert size_class(width, height, frames) == expected


def test_forwards_are_counted_by_module_size_and_rows() -> None:
    stats = EngineStats()

    for rows, seconds in ((1, 0.5), (4, 1.0), (4, 2.0)):
        stats.record_forward("transformer", ("flux", "1024"), rows, seconds)

    assert stats.forwards == {
        ForwardLabels("transformer", "flux", "1024", 1): (1, 0.5),
        ForwardLabels("transformer", "flux", "1024", 4): (2, 3.0),
    }


class RecordedMetrics:
    """Stands in for Ray's metrics: Ray's own would need a cluster to be read."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float, dict[str, str]]] = []

    def Counter(self, name: str, _meaning: str, tag_keys: tuple[str, ...]) -> Any:
        return self._metric(name)

    def Gauge(self, name: str, _meaning: str, tag_keys: tuple[str, ...]) -> Any:
        return self._metric(name)

    def _metric(self, name: str) -> Any:
        recorded = self

        class One:
            def inc(self, value: float, labels: dict[str, str]) -> None:
                recorded.calls.append((name, value, labels))

            set = inc

        return One()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> RecordedMetrics:
    made = RecordedMetrics()
    monkeypatch.setattr("ray.serve.metrics.Counter", made.Counter)
    monkeypatch.setattr("ray.serve.metrics.Gauge", made.Gauge)
    return made


def test_counters_are_reported_by_their_increase_and_gauges_by_their_value(recorded: RecordedMetrics) -> None:
    reporter = Reporter()

    for steps in (0, 3, 3, 10):
        reporter.report([Sample("weft_steps_total", steps), Sample("weft_slots", 4)])

    assert [call for call in recorded.calls if call[0] == "weft_steps_total"] == [
        ("weft_steps_total", 3, {}),
        ("weft_steps_total", 7, {}),
    ]
    assert [call for call in recorded.calls if call[0] == "weft_slots"] == [("weft_slots", 4, {})] * 4


def test_a_failed_collection_does_not_end_the_reports(recorded: RecordedMetrics) -> None:
    reporter, reported_again, calls = Reporter(interval_s=0.001), threading.Event(), 0

    def read() -> list[Sample]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("a part was being replaced")
        reported_again.set()
        return [Sample("weft_slots", 1)]

    reporter.start(read)

    assert reported_again.wait(patience())
    reporter.stop()


def test_ray_accepts_every_declared_metric() -> None:
    reporter = Reporter()

    reporter.report(
        Sample(metric.name, 1.0, dict.fromkeys(metric.labels, "x")) for metric in INFERENCE_METRICS.values()
    )


class Doubling(nn.Module):
    """Doubles its input; runs out of memory with more than two rows."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if len(hidden_states) > 2:
            raise torch.OutOfMemoryError("it is full")
        return hidden_states * 2


DOUBLING = Doubling()


@pytest.fixture
def worker() -> Iterator[Worker]:
    restore = intercept([DOUBLING])
    scheduler = StepScheduler(4)
    made = Worker(Engine(scheduler), scheduler, slots=4)
    yield made
    made.stop()
    restore()


async def run(worker: Worker, rows: int = 1, error: Exception | None = None) -> list[Any]:
    def work(emit: Emit) -> None:
        DOUBLING(torch.ones(rows, 1))
        emit(Step(1, 1))
        if error is not None:
            raise error

    job = ScheduledJob(labels=("tiny", "256"), batch_size=rows)
    return [item async for item in worker.submit(work, job)]


def values(worker: Worker, name: str) -> dict[tuple[str, ...], float]:
    """Values of one metric by its labels."""
    found = [sample for sample in collectors.worker_samples(worker) if sample.name == name]
    return {tuple(sample.labels.values()): sample.value for sample in found}


async def test_a_worker_counts_requests_steps_forwards_and_failures(worker: Worker) -> None:
    await run(worker, rows=2)
    await run(worker, rows=3)  # never fits
    await run(worker, error=NotFinite("NaN"))

    assert values(worker, "weft_requests_total") == {(): 3}
    assert values(worker, "weft_requests_failed_total") == {("out_of_memory",): 1, ("not_finite",): 1}
    assert values(worker, "weft_steps_total") == {(): 2}
    assert values(worker, "weft_forwards_total") == {
        ("tiny", "Doubling.forward", "256", "2"): 1,
        ("tiny", "Doubling.forward", "256", "1"): 1,
    }
    assert values(worker, "weft_requests_running") == values(worker, "weft_requests_waiting") == {(): 0}
    assert values(worker, "weft_slots") == {(): 4}


async def test_requests_returned_by_a_draining_worker_are_counted(worker: Worker) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def work(_emit: Emit) -> None:
        entered.set()
        assert go_on.wait(patience(2))
        for _ in range(3):  # orders are read between two forwards
            DOUBLING(torch.ones(1, 1))

    async def follow() -> list[Any]:
        return [item async for item in worker.submit(work, ScheduledJob())]

    task = asyncio.create_task(follow())
    await asyncio.to_thread(entered.wait, 60)
    worker.drain(0.0)
    go_on.set()
    await task

    assert values(worker, "weft_requests_handed_back_total") == {(): 1}


async def test_lines_from_within_a_pipeline_name_the_job_of_their_own_fiber(
    worker: Worker,
) -> None:
    seen: dict[str, list[str]] = {}

    async def one(name: str) -> None:
        log_context.bind(LogContext(job_id=name))

        def work(_emit: Emit) -> None:
            for _ in range(3):
                seen.setdefault(name, []).append(log_context.current().job_id)
                DOUBLING(torch.ones(1, 1))

        async for _ in worker.submit(work, ScheduledJob()):
            pass

    await asyncio.gather(*(asyncio.create_task(one(name)) for name in "abc"))

    assert seen == {name: [name] * 3 for name in "abc"}


async def test_batch_sizes_are_counted_by_what_is_known_of_them(worker: Worker) -> None:
    def known(proven: tuple[int, ...], refused: tuple[int, ...], pending: tuple[int, ...]) -> ProofState:
        return ProofState("UNet.forward", "4x8x8 float32", 1, proven, refused, pending)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "proofs", lambda: [known((2, 4), (3,), ()), known((2,), (), (4, 6))])
        found = values(worker, "weft_batch_sizes")

    assert found == {
        ("UNet.forward", "proven"): 3,
        ("UNet.forward", "refused"): 1,
        ("UNet.forward", "pending"): 2,
    }


async def test_forwards_in_sizes_without_a_proof_are_counted(worker: Worker) -> None:
    assert values(worker, "weft_forwards_unproven_total") == {(): 0}

    while worker.stats.unproven_forwards == 0:  # without a policy of exactness two calls share a forward
        await asyncio.gather(run(worker), run(worker))

    assert values(worker, "weft_forwards_unproven_total") == {(): worker.stats.unproven_forwards}
