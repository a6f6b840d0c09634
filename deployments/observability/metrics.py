"""Reports the metrics of a replica to Ray at intervals."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from deployments.observability.declarations import METRICS
from deployments.observability.ray_metrics import RayMeter

REPORT_INTERVAL_S = 2.0  # shorter than the interval at which Ray's agent collects

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """The current value of a declared metric; for a counter, its total."""

    name: str
    value: float
    labels: dict[str, str] = {}


class Reporter:
    """Reports samples to Ray from a thread of its own, so that requests do not wait for it."""

    def __init__(self, interval_s: float = REPORT_INTERVAL_S) -> None:
        self._meter = RayMeter()
        self._reported: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}  # totals of counters
        self._stopped = threading.Event()
        self._interval_s = interval_s

    def start(self, read: Callable[[], Iterable[Sample]]) -> None:
        """Report the samples that `read` returns, every 2 s until `stop`. A thread calls it."""
        thread = threading.Thread(target=self._run, args=(read,), name="telemetry", daemon=True)
        thread.start()

    def stop(self) -> None:
        """End the reports."""
        self._stopped.set()

    def report(self, samples: Iterable[Sample]) -> None:
        """Report these samples now."""
        for name, value, labels in samples:
            if METRICS[name].kind == "gauge":
                self._meter.put(name, value, **labels)
                continue
            key = (name, tuple(sorted(labels.items())))
            increase = value - self._reported.get(key, 0.0)
            if increase > 0:  # Ray's counters do not accept 0
                self._meter.add(name, increase, **labels)
                self._reported[key] = value

    def _run(self, read: Callable[[], Iterable[Sample]]) -> None:
        while not self._stopped.wait(self._interval_s):
            try:
                self.report(read())
            except Exception:  # the outermost loop of this thread: a failure must not end the reports
                logger.exception("the metrics of this replica were not reported")
