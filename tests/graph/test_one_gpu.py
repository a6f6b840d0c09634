"""configs/serve/one_gpu.yaml on tiny weights: two picture models share the one replica that has the GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from serve_app.ray_serve import local_cluster
from tests.graph.calls import ended
from tests.graph.running import PATIENCE_S, ROOT, Service, until
from tests.graph.test_fleet import tiny_card

pytestmark = pytest.mark.ray

STAND_INS = {
    "flux.1-schnell": "tiny-flux-schnell",
    "sdxl-base-1.0": "tiny-sdxl-base",
    "sdxl-refiner-1.0": "tiny-sdxl-refiner",
    "tiny-wan": "tiny-wan",
}


@pytest.fixture
def client(service: Service, tmp_path: Path) -> Iterator[httpx.Client]:
    """The shipped file beside what is deployed there already, under /one."""
    for card_id, tiny in STAND_INS.items():
        card = tiny_card(card_id, tiny)
        (tmp_path / f"{card_id}.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    shipped = yaml.safe_load((ROOT / "configs/serve/one_gpu.yaml").read_text(encoding="utf-8"))
    (application,) = shipped["applications"]
    application |= {"name": "one", "route_prefix": "/one"}
    application["args"]["settings"] = {"cards_dir": str(tmp_path), "redis_prefix": "weft:one:"}
    config = copy.deepcopy(service.config)
    config["applications"].append(application)
    lines: list[str] = []
    assert local_cluster.deploy(config, lines.append), "\n".join(lines)
    with httpx.Client(base_url=f"{service.url}/one", timeout=PATIENCE_S) as made:
        yield made
    assert local_cluster.deploy(service.config, lines.append), "\n".join(lines)


def test_two_picture_models_share_one_replica_and_a_video_model_sleeps_beside_them(
    client: httpx.Client, service: Service
) -> None:
    def states() -> dict[str, Any]:
        return {model["id"]: model["state"] for model in client.get("/api/models").json()["models"]}

    awake = {"flux.1-schnell": "ready", "sdxl-base-1.0": "ready", "tiny-wan": "idle"}
    until(lambda: states() == awake, "all is as the file says")
    bodies = [
        {"model": model, "prompt": "a red circle", "num_inference_steps": 4, "seed": 1}
        for model in ("flux.1-schnell", "sdxl-base-1.0")
    ]
    accepted = [client.post("/api/generate/image", json=fields) for fields in bodies]
    jobs = [ended(client, answer.json()["id"]) for answer in accepted]

    assert [job["status"] for job in jobs] == ["completed"] * 2
    assert len(service.pids_with("ServeReplica:one:pictures")) == 1
    assert service.pids_with("ServeReplica:one:tiny-wan") == []
