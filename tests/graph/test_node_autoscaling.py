"""GPU nodes come when jobs want them and go when none does: Ray's own autoscaler, its nodes processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.graph.calls import ended, picture, submit
from tests.graph.clusters import RayCluster
from tests.graph.running import PATIENCE_S, until

pytestmark = pytest.mark.ray

NODES = 2
SLOTS = 2  # of one replica
REQUEST = {"prompt": "a red circle", "num_inference_steps": 100}
SOON = {  # instead of the minutes of an installation
    "min_replicas": 0,
    "max_replicas": NODES,
    "target_ongoing_requests": SLOTS,
    "upscale_delay_s": 0.0,
    "downscale_delay_s": 1.0,
    "look_back_period_s": 2.0,
    "metrics_interval_s": 0.5,
}


def test_nodes_and_replicas_appear_with_jobs_and_go_back_to_none(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with RayCluster(tmp_path, autoscaled=NODES) as cluster:
        model = cluster.card(serving={"slots": SLOTS, "min_replicas": 0, "max_replicas": NODES})
        scaling = [{"name": model, "autoscaling_config": SOON}]
        cluster.serve(cluster.config(args={"models": [model]}, deployments=scaling))
        assert len(cluster.nodes()) == 1, "no job, no GPU node"
        assert cluster.replicas(model) == []
        began = time.monotonic()

        with httpx.Client(base_url=cluster.url, timeout=PATIENCE_S) as client:
            jobs: list[str] = []
            homes: set[str] = set()

            def both_serve() -> bool:
                states = [client.get(f"/api/generate/{job}").json()["status"] for job in jobs]
                at_work = len(states) - states.count("completed")
                for _ in range(2 * SLOTS * NODES - at_work):  # more than one node can take
                    jobs.append(submit(client, **REQUEST, model=model, seed=len(jobs)))
                homes.update(replica["node_id"] for replica in cluster.replicas(model))
                return len(homes) == NODES

            until(both_serve, "replicas run on both nodes", every_s=0.5)
            grown_s = time.monotonic() - began
            endings = [ended(client, job) for job in jobs]
            done_s = time.monotonic() - began

            assert {job["status"] for job in endings} == {"completed"}
            assert picture(client, endings[0]).size == (128, 128)

        until(lambda: cluster.replicas(model) == [], "no replica is left", every_s=0.5)
        until(lambda: len(cluster.nodes()) == 1, "no GPU node is left", every_s=0.5)
        gone_s = time.monotonic() - began
        record_property("nodes_up_s", grown_s)
        record_property("nodes_jobs_done_s", done_s)
        record_property("nodes_gone_s", gone_s)
        assert cluster.ready(), "what answers HTTP stayed"
