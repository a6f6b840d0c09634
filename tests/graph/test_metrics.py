"""What a running Weft exports: metrics at Ray's port, log lines with their job, and traces."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from deployments.observability.declarations import METRICS
from tests.graph.calls import ended
from tests.graph.running import ROOT, Service, until
from tests.patience import patience

pytestmark = pytest.mark.ray

NEEDS_A_GPU = {"weft_device_bytes", "weft_batches_halved_total", "weft_memory_limit_bytes"}
NEEDS_A_PRICE = {"weft_job_cost_total"}  # in the card; held by tests/serving/jobs/test_usage.py
NEEDS_FAR_WEIGHTS = {"weft_nodes_with_weights", "weft_nodes_wanting_weights"}
# held by tests/serving/jobs/test_dispatch_metrics.py and tests/inference/observability/test_collectors.py
NEEDS_TROUBLE = {
    "weft_attempts_given_back_total",
    "weft_leases_lost_total",
    "weft_requests_failed_total",
    "weft_requests_handed_back_total",
    "weft_device_failures_total",
    "weft_forwards_unproven_total",
    "weft_adapters_evicted_total",
    "weft_extras_evicted_total",
    "weft_jobs_same_total",  # the cache of results is off in this folder
}
USUAL = set(METRICS) - NEEDS_A_GPU - NEEDS_TROUBLE - NEEDS_FAR_WEIGHTS - NEEDS_A_PRICE
STATES = {metric.name for metric in METRICS.values() if metric.kind == "gauge"}

Series = dict[str, dict[tuple[tuple[str, str], ...], float]]


def scraped() -> Series:
    """Our metrics at the ports of all nodes: by name without ray_, by labels. Of histograms: the counts."""
    found: Series = {}
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for family in text_string_to_metric_families(httpx.get(url, timeout=patience()).text):
            for sample in family.samples:
                if sample.name.startswith("ray_weft_") and not sample.name.endswith(("_bucket", "_sum")):
                    name = sample.name.removeprefix("ray_").removesuffix("_count")
                    found.setdefault(name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


@pytest.fixture(scope="module")
def work(service: Service) -> Iterator[dict[str, Any]]:
    """Two pictures of one prompt with a LoRA, a video, a refusal; and what was counted before."""
    with service.client() as client:
        before = scraped()
        headers = {"x-request-id": "metrics-test-0001"}
        fields = {"model": "tiny-flux-schnell", "prompt": "a red circle", "loras": "night:1.0"}
        for seed in (5, 6):
            answer = client.post("/api/generate/image", json=fields | {"seed": seed}, headers=headers)
            picture = ended(client, answer.json()["id"])
        film = {"model": "tiny-wan", "prompt": "a red circle", "seed": 3, "steps": 2, "num_frames": 17}
        video = ended(client, client.post("/api/generate/video", json=film, headers=headers).json()["id"])
        client.post("/v1/images/generations", json={"prompt": "a star", "model": "tiny-flux-schnell"})
        refused = client.post("/api/generate/image", json={"prompt": "a star", "model": "no-such-model"})
        assert (picture["status"], video["status"], refused.status_code) == ("completed", "completed", 404)
        yield {"before": before, "video": video["id"]}


def test_every_usual_metric_is_exported_and_moves(work: dict[str, Any]) -> None:
    before: Series = work["before"]
    seen: Series = {}

    def standing_still() -> list[str]:
        for name, series in scraped().items():
            seen.setdefault(name, {}).update(series)  # Ray drops a gauge that is not reported again in time
        return [
            name
            for name in sorted(USUAL)
            if name not in seen
            or (
                name not in STATES
                and not any(value > before.get(name, {}).get(key, 0.0) for key, value in seen[name].items())
            )
        ]

    until(lambda: not standing_still(), "all usual metrics are exported and move", every_s=0.5)

    (first, *_) = seen["weft_forwards_total"]
    assert {"model", "module", "size", "rows", "deployment", "replica"} <= dict(first).keys()
    assert ("size", "256") in {pair for labels in seen["weft_forwards_total"] for pair in labels}
    models = {dict(labels)["model"] for labels in seen["weft_jobs_queued"]}
    assert models >= {"tiny-wan", "slow-flux", "tiny-flux-schnell"}


def log_lines(job_id: str) -> list[dict[str, Any]]:
    """All JSON lines of replicas that name this job."""
    folder = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"  # type: ignore[union-attr]
    found = []
    for file in folder.glob("replica_*.log"):
        for line in file.read_text(errors="replace").splitlines():
            if job_id in line:
                found.append(json.loads(line))
    return found


def test_lines_of_a_job_name_it_and_its_request_in_both_layers(work: dict[str, Any]) -> None:
    def deployments() -> dict[str, set[str]]:
        by_deployment: dict[str, set[str]] = {}
        for line in log_lines(work["video"]):
            assert line["job_id"] == work["video"]
            by_deployment.setdefault(line["deployment"], set()).add(line["request_id"])
        return by_deployment

    wanted = {"weft_Ingress", "weft_Dispatcher", "weft_VideoEncoder"}
    found = until(lambda: lines if wanted <= (lines := deployments()).keys() else None, f"{wanted} log")

    assert set().union(*found.values()) == {"metrics-test-0001"}


def spans() -> list[dict[str, Any]]:
    folder = Path(os.environ["WEFT_TRACE_DIR"])
    return [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]


def test_one_trace_leads_from_the_ingress_over_dispatcher_and_model_to_the_encoder(
    client: httpx.Client,
) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    film = {"model": "tiny-wan", "prompt": "a blue star", "seed": 4, "steps": 2, "num_frames": 17}
    answer = client.post(
        "/api/generate/video", json=film, headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    )
    assert ended(client, answer.json()["id"])["status"] == "completed"

    def whole() -> list[str] | None:
        names = [span["name"] for span in spans() if span["context"]["trace_id"] == f"0x{trace}"]
        replicas = {name.split()[1] for name in names if name.startswith("replica_handle_request")}
        ours = {"POST /api/generate/video", "dispatch tiny-wan"}  # FastAPI's own span, and the dispatcher's
        done = {"tiny-wan", "VideoEncoder"} <= replicas and ours <= set(names)
        return names if done else None

    until(whole, "all four have written their spans")


def test_weights_are_fetched_to_the_nodes_before_a_replica_starts(service: Service, tmp_path: Path) -> None:
    from ray import serve

    from deployments.protocol.card import Weights, load_card
    from deployments.weights_prefetcher import WeightsPrefetcher

    url = f"file://{ROOT}/models/tiny-flux-schnell"
    card = load_card(ROOT / "configs/models/tiny-flux-schnell.yaml")
    far = card.model_copy(update={"weights": Weights(path=url, dtype="float32"), "controls": {}})
    nowhere = card.model_copy(update={"weights": Weights(path=f"file://{tmp_path}/nothing")})
    fetcher = serve.deployment(ray_actor_options={"num_cpus": 0})(WeightsPrefetcher)
    try:
        handle = serve.run(fetcher.bind([far], poll_s=0.1), name="fetcher", route_prefix=None)
        (state,) = until(
            lambda: (
                set(states.values()) - {"fetching"}
                if (states := handle.status.remote().result()) and "fetching" not in states.values()
                else None
            ),
            "the weights were fetched",
        )
        assert state == "ready"
        fetched = [path.parent for path in Path(os.environ["WEFT_MODEL_CACHE"]).glob("*/model_index.json")]
        assert len(fetched) == 1

        handle = serve.run(fetcher.bind([nowhere], poll_s=0.1), name="fetcher", route_prefix=None)
        reasons = until(
            lambda: [reason for reason in handle.status.remote().result().values() if "nothing" in reason],
            "the failure is logged",
        )
        assert "cannot be loaded: there is no folder at" in reasons[0]
    finally:
        serve.delete("fetcher")
