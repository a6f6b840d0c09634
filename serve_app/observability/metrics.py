"""Meters: they take values of the metrics that deployments/observability/declarations.py declares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from deployments.observability.declarations import METRICS, Metric


class Meter(Protocol):
    """Takes values of declared metrics, each with all of its labels."""

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Increase a counter."""

    def put(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram."""


class LocalMeter:
    """Keeps the values in this process, in a registry of its own: two apps in one process do not collide."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._metrics: dict[str, Any] = {}  # created at first use, by name

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        self._labelled(name, labels).inc(value)

    def put(self, name: str, value: float, **labels: str) -> None:
        self._labelled(name, labels).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._labelled(name, labels).observe(value)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _labelled(self, name: str, labels: dict[str, str]) -> Any:
        metric = self._metrics.get(name)
        if metric is None:
            metric = self._metrics[name] = self._create(METRICS[name])
        return metric.labels(**labels) if labels else metric

    def _create(self, metric: Metric) -> Any:
        name, description, labels = metric.name, metric.description, metric.labels
        match metric.kind:
            case "counter":
                return Counter(name, description, labels, registry=self.registry)
            case "gauge":
                return Gauge(name, description, labels, registry=self.registry)
            case "histogram":
                return Histogram(name, description, labels, registry=self.registry, buckets=metric.buckets)


class Meters:
    """Passes every value to several meters."""

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
