"""The policy inside Serve: jobs wake a sleeping model, many get a second replica, and none is left later."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import yaml
from ray import serve

from serve_app.app import build
from serve_app.ray_serve.args import AppArgs
from tests.graph.running import PATIENCE_S, ROOT, Service, until

pytestmark = pytest.mark.ray

NAME = "napping"
AUTOSCALING = {
    "utilization": 0.05,  # some seconds of work need a second replica
    "rate_window_s": 10.0,
    "near_window_s": 5.0,
    "drain_s": 20.0,
    "wait_s": 0.0,
    "hold_s": 1.0,
    "idle_s": 2.0,
    "cold_start_s": 5.0,
    "request_s": 5.0,
}


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    """An application of its own, whose model sleeps and may have two replicas of two slots."""
    card = yaml.safe_load((ROOT / "configs/models/tiny-flux-schnell.yaml").read_text(encoding="utf-8"))
    card |= {"id": NAME, "aliases": [], "adapters": [], "corrects": False}
    card["steps"] = {"min": 1, "default": 4, "max": 1000}
    card["serving"] = {
        "num_gpus": 0,
        "num_cpus": 0.1,
        "slots": 2,
        "lora": "none",
        "warm_up": False,
        "min_replicas": 0,
        "max_replicas": 2,
        "autoscaling": AUTOSCALING,
    }
    args = AppArgs.model_validate({"models": [card], "settings": {"redis_prefix": f"weft:{NAME}:"}})
    serve.run(build(args), name=NAME, route_prefix=f"/{NAME}")
    try:
        with httpx.Client(base_url=f"{service.url}/{NAME}", timeout=PATIENCE_S) as made:
            yield made
    finally:
        serve.delete(NAME, _blocking=False)  # the session goes on meanwhile


def replicas() -> int:
    """Of the model, starting or running."""
    states = serve.status().applications[NAME].deployments[NAME].replica_states
    return sum(count for state, count in states.items() if state in ("STARTING", "RUNNING"))


def submit(client: httpx.Client, steps: int, seed: int) -> str:
    fields = {"model": NAME, "prompt": "a red circle", "num_inference_steps": steps, "seed": seed}
    answer = client.post("/api/generate/image", json=fields)
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def completed(client: httpx.Client, job_id: str) -> bool:
    status = client.get(f"/api/generate/{job_id}").json()["status"]
    assert status not in ("failed", "cancelled")
    return bool(status == "completed")


def test_from_none_to_many_and_back(client: httpx.Client) -> None:
    assert replicas() == 0
    first = submit(client, 4, 0)
    until(lambda: replicas() == 1, "a request wakes one replica")
    until(lambda: completed(client, first), "it is served")

    others = [submit(client, 60, seed) for seed in range(1, 13)]
    until(lambda: replicas() == 2, "jobs in the store get more replicas")
    for job in others:
        until(lambda job=job: completed(client, job), "all are served")  # type: ignore[misc]

    until(lambda: replicas() == 0, "the model scales to zero without work")
