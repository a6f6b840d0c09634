"""Numbers of the workshop: what an engine counts, and how they are told."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from deployments.engine.tally import Forwards, Tally, size_class
from deployments.telemetry import METRICS, Reading, Reporter


@pytest.mark.parametrize(
    ("width", "height", "frames", "told"),
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
def test_sizes_fall_into_few_classes(width: int, height: int, frames: int | None, told: str) -> None:
    assert size_class(width, height, frames) == told


def test_forwards_are_counted_by_module_size_and_rows() -> None:
    tally = Tally()

    for rows, seconds in ((1, 0.5), (4, 1.0), (4, 2.0)):
        tally.ran("transformer", ("flux", "1024"), rows, seconds)

    assert tally.forwards == {
        Forwards("transformer", "flux", "1024", 1): (1, 0.5),
        Forwards("transformer", "flux", "1024", 4): (2, 3.0),
    }


class Told:
    """Stands in for Ray's metrics: Ray's own would need a cluster to be read."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float, dict[str, str]]] = []

    def Counter(self, name: str, _meaning: str, tag_keys: tuple[str, ...]) -> Any:
        return self._metric(name)

    def Gauge(self, name: str, _meaning: str, tag_keys: tuple[str, ...]) -> Any:
        return self._metric(name)

    def _metric(self, name: str) -> Any:
        told = self

        class One:
            def inc(self, value: float, labels: dict[str, str]) -> None:
                told.calls.append((name, value, labels))

            set = inc

        return One()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    made = Told()
    monkeypatch.setattr("ray.serve.metrics.Counter", made.Counter)
    monkeypatch.setattr("ray.serve.metrics.Gauge", made.Gauge)
    return made


def test_counters_are_told_what_came_since_and_gauges_as_they_are(told: Told) -> None:
    reporter = Reporter()

    for steps in (0, 3, 3, 10):
        reporter.tell([Reading("weft_steps", steps), Reading("weft_slots", 4)])

    assert [call for call in told.calls if call[0] == "weft_steps"] == [
        ("weft_steps", 3, {}),
        ("weft_steps", 7, {}),
    ]
    assert [call for call in told.calls if call[0] == "weft_slots"] == [("weft_slots", 4, {})] * 4


def test_a_reading_that_fails_once_does_not_end_the_reports(told: Told) -> None:
    reporter, told_again, calls = Reporter(every_s=0.001), threading.Event(), 0

    def read() -> list[Reading]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("a part was being replaced")
        told_again.set()
        return [Reading("weft_slots", 1)]

    reporter.start(read)

    assert told_again.wait(30)
    reporter.stop()


def test_rays_own_metrics_take_every_declared_one() -> None:
    reporter = Reporter()

    reporter.tell(Reading(metric.name, 1.0, dict.fromkeys(metric.labels, "x")) for metric in METRICS.values())
