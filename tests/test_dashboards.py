"""The dashboard, the alerts and docs/metrics.md speak of metrics that the code declares, of all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.observability.declarations import INFERENCE_METRICS, METRICS, SERVING_METRICS

ROOT = Path(__file__).parent.parent
SUFFIXES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
EXPORTED = {  # as Ray's agent writes them
    f"ray_{metric.name}{suffix}": metric for metric in METRICS.values() for suffix in SUFFIXES[metric.kind]
}
SELECTOR = re.compile(r"(ray_weft_\w+)(?:\{([^}]*)\})?")
# of every series: Serve's own and the histogram's
EVERYWHERE = {"deployment", "replica", "application", "le"}


def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((ROOT / "configs/grafana/weft.json").read_text())
    return read


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((ROOT / "configs/prometheus/alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> list[str]:
    targets = [target for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    return [target["expr"] for target in targets] + [rule["expr"] for rule in rules()]


def test_the_two_layers_declare_different_names() -> None:
    assert not set(SERVING_METRICS) & set(INFERENCE_METRICS)


@pytest.mark.parametrize("expression", expressions())
def test_expressions_name_exported_metrics_and_their_labels(expression: str) -> None:
    found = SELECTOR.findall(expression)
    by = set(re.findall(r"\w+", " ".join(re.findall(r"\bby \(([^)]*)\)", expression))))

    assert found, "it looks at none of our metrics"
    known = set(EVERYWHERE)
    for name, selector in found:
        assert name in EXPORTED, f"{name} is not exported"
        labels = set(EXPORTED[name].labels)
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) <= labels | EVERYWHERE
        known |= labels
    assert by <= known
    assert expression.count("(") == expression.count(")")


def test_the_docs_name_every_metric() -> None:
    text = (ROOT / "docs/metrics.md").read_text()

    named = set(re.findall(r"`(weft_\w+)`", text))

    assert named == set(METRICS)


def test_the_docs_list_the_labels_of_each_metric_as_declared() -> None:
    text = (ROOT / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| `(weft_\w+)` \| (\w+) \| ([^|]*) \|", text, re.MULTILINE)

    documented = {name: (kind, tuple(re.findall(r"\w+", labels))) for name, kind, labels in rows}

    assert documented == {name: (metric.kind, metric.labels) for name, metric in METRICS.items()}


def test_panels_lie_beside_each_other_and_ids_differ() -> None:
    panels = dashboard()["panels"]
    cells = [
        (x, y)
        for panel in panels
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]

    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_every_alert_says_what_happened_and_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "action"}, rule["alert"]
