"""Meters take every declared metric with its labels."""

from __future__ import annotations

import pytest

from deployments.observability.declarations import SERVING_METRICS
from deployments.observability.ray_metrics import RayMeter
from serve_app.observability.metrics import LocalMeter, Meters


def value(meter: LocalMeter, sample: str, **labels: str) -> float | None:
    return meter.registry.get_sample_value(sample, labels)


def test_every_declared_metric_takes_numbers_with_its_labels() -> None:
    meter = LocalMeter()
    for metric in SERVING_METRICS.values():
        labels = dict.fromkeys(metric.labels, "x")
        {"counter": meter.add, "gauge": meter.put, "histogram": meter.observe}[metric.kind](
            metric.name, 2.0, **labels
        )

    text = meter.text().decode()

    assert [name for name in SERVING_METRICS if name not in text] == []
    assert value(meter, "weft_jobs_queued", model="x") == 2.0


def test_an_undeclared_label_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"[Ll]abel"):
        LocalMeter().add("weft_jobs_submitted_total", model="x", prompt="a red fox")


def test_several_meters_get_the_same_values() -> None:
    first, second = LocalMeter(), LocalMeter()

    Meters((first, second, RayMeter())).add("weft_refusals_total", kind="rate_limited")

    assert value(first, "weft_refusals_total", kind="rate_limited") == 1.0
    assert value(second, "weft_refusals_total", kind="rate_limited") == 1.0
