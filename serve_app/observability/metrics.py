"""What this floor counts, and where its log lines go in a replica: into Serve's log file, with their job."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from deployments.protocol.log_context import add_context_filters

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 300.0)
LONG_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


def join_serve_log() -> None:
    """Send what `serve_app` logs to the handlers Serve gave this replica (JSON, replica, ids).

    Without it Python's root logger would drop everything below WARNING.
    """
    ours, serves = logging.getLogger("serve_app"), logging.getLogger("ray.serve")
    add_context_filters(serves.handlers)
    ours.handlers, ours.propagate = serves.handlers, False
    ours.setLevel(serves.level)


@dataclass(frozen=True, slots=True)
class ServiceMetric:
    """One declared metric. No label is ever a prompt, a key, a user or an id: their values are few."""

    name: str  # counters get a _total in Prometheus' text
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS = {
    metric.name: metric
    for metric in (
        ServiceMetric(
            "weft_http_requests",
            "counter",
            "Answers sent, by route template and status.",
            ("method", "route", "status"),
        ),
        ServiceMetric(
            "weft_http_request_seconds",
            "histogram",
            "Time to the last byte of the answer; event streams last as long as their job.",
            ("route",),
            SECONDS,
        ),
        ServiceMetric(
            "weft_refusals",
            "counter",
            "Errors answered, by kind: rate_limited, overloaded, quota_exceeded, bad_request, ...",
            ("kind",),
        ),
        ServiceMetric("weft_jobs_submitted", "counter", "Jobs accepted.", ("model", "task")),
        ServiceMetric(
            "weft_jobs_same",
            "counter",
            "Accepted jobs that are not run: copied from an earlier one, or waiting for one that runs.",
            ("model", "how"),
        ),
        ServiceMetric(
            "weft_job_submit_seconds",
            "histogram",
            "From the parsed request to the durable job.",
            (),
            SECONDS,
        ),
        ServiceMetric(
            "weft_jobs_finished_observed",
            "counter",
            "Ends of jobs that a waiting or listening client was told of.",
            ("state",),
        ),
        ServiceMetric(
            "weft_jobs_queued", "gauge", "Jobs that wait, as each dispatcher sees the store.", ("model",)
        ),
        ServiceMetric("weft_jobs_running", "gauge", "Jobs that this dispatcher runs.", ("model",)),
        ServiceMetric(
            "weft_slots_free", "gauge", "Jobs more that this dispatcher could give a model.", ("model",)
        ),
        ServiceMetric(
            "weft_jobs_ended",
            "counter",
            "Jobs that ended, by state and by error kind.",
            ("model", "state", "error"),
        ),
        ServiceMetric(
            "weft_attempts_given_back",
            "counter",
            "Attempts whose job waits again: a replica drained or was lost.",
            ("model",),
        ),
        ServiceMetric(
            "weft_leases_lost",
            "counter",
            "Jobs whose worker fell silent, found by this dispatcher.",
            ("model",),
        ),
        ServiceMetric(
            "weft_job_wait_seconds",
            "histogram",
            "From acceptance to the claim of the last attempt, of jobs that ran.",
            ("model",),
            LONG_SECONDS,
        ),
        ServiceMetric(
            "weft_job_total_seconds",
            "histogram",
            "From acceptance to the end, of completed jobs that ran.",
            ("model",),
            LONG_SECONDS,
        ),
    )
}


class Meter(Protocol):
    """Takes numbers for declared metrics, each with all of its labels."""

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Let a counter grow."""

    def put(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""

    def observe(self, name: str, value: float, **labels: str) -> None:
        """One more value of a histogram."""


class LocalMeter:
    """Keeps the numbers in this process, in a registry of its own: two apps here do not collide."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._made: dict[str, Any] = {}

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        self._labelled(name, labels).inc(value)

    def put(self, name: str, value: float, **labels: str) -> None:
        self._labelled(name, labels).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._labelled(name, labels).observe(value)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def _labelled(self, name: str, labels: dict[str, str]) -> Any:
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = self._make(METRICS[name])
        return made.labels(**labels) if labels else made

    def _make(self, metric: ServiceMetric) -> Any:
        name, meaning, labels = metric.name, metric.meaning, metric.labels
        match metric.kind:
            case "counter":
                return Counter(name, meaning, labels, registry=self.registry)
            case "gauge":
                return Gauge(name, meaning, labels, registry=self.registry)
            case "histogram":
                return Histogram(name, meaning, labels, registry=self.registry, buckets=metric.buckets)


class RayMeter:
    """Hands the numbers to Ray, whose agent on this node exports them as ray_weft_..., with the replica's
    deployment and id. For a replica."""

    def __init__(self) -> None:
        from ray.serve import metrics

        self._ray_metrics: Any = metrics  # whose annotations allow one label only
        self._made: dict[str, Any] = {}

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        self._metric(name).inc(value, labels)

    def put(self, name: str, value: float, **labels: str) -> None:
        self._metric(name).set(value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._metric(name).observe(value, labels)

    def _metric(self, name: str) -> Any:
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = self._make(METRICS[name])
        return made

    def _make(self, metric: ServiceMetric) -> Any:
        name, meaning, labels = metric.name, metric.meaning, metric.labels
        match metric.kind:
            case "counter":
                return self._ray_metrics.Counter(name, meaning, tag_keys=labels)
            case "gauge":
                return self._ray_metrics.Gauge(name, meaning, tag_keys=labels)
            case "histogram":
                return self._ray_metrics.Histogram(name, meaning, list(metric.buckets), tag_keys=labels)


class Meters:
    """Hands every number to several meters."""

    def __init__(self, meters: Sequence[Meter]) -> None:
        self._meters = meters

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        for meter in self._meters:
            meter.add(name, value, **labels)

    def put(self, name: str, value: float, **labels: str) -> None:
        for meter in self._meters:
            meter.put(name, value, **labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        for meter in self._meters:
            meter.observe(name, value, **labels)
