"""Sends declared metrics to Ray, whose agent on the node exports them with deployment and replica id."""

from __future__ import annotations

from typing import Any

from ray.serve import metrics as serve_metrics

from deployments.observability.declarations import METRICS, Metric

_ray: Any = serve_metrics  # its annotations allow one label only


class RayMeter:
    """Takes values of declared metrics, each with all of its labels. For a replica."""

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}  # created at first use, by name

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Increase a counter. value: above 0, as Ray requires."""
        self._metric(name).inc(value, labels)

    def put(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._metric(name).set(value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        self._metric(name).observe(value, labels)

    def _metric(self, name: str) -> Any:
        metric = self._metrics.get(name)
        if metric is None:
            metric = self._metrics[name] = _create(METRICS[name])
        return metric


def _create(metric: Metric) -> Any:
    match metric.kind:
        case "counter":
            return _ray.Counter(metric.name, metric.description, tag_keys=metric.labels)
        case "gauge":
            return _ray.Gauge(metric.name, metric.description, tag_keys=metric.labels)
        case "histogram":
            return _ray.Histogram(
                metric.name, metric.description, list(metric.buckets), tag_keys=metric.labels
            )
