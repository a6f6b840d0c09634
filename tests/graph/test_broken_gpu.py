"""A GPU breaks under a replica: its jobs finish on a new one, with the same pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.graph import breaking_app
from tests.graph.calls import Undisturbed, ended, picture, submit
from tests.graph.clusters import RayCluster
from tests.graph.running import PATIENCE_S, until

pytestmark = pytest.mark.ray

MODEL = "slow-flux"
REQUEST: dict[str, Any] = {"model": MODEL, "prompt": "a red circle", "num_inference_steps": 200, "seed": 5}


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("orders")


@pytest.fixture(scope="module")
def cluster(orders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with RayCluster(tmp_path_factory.mktemp("cluster"), **{breaking_app.FOLDER: str(orders)}) as made:
        made.add_worker("worker")
        model = made.card(serving={"min_replicas": 1})
        made.serve(made.config(args={"models": [model]}, import_path="tests.graph.breaking_app:build"))
        yield made


@pytest.fixture
def client(cluster: RayCluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.url, timeout=PATIENCE_S) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(cluster: RayCluster) -> Undisturbed:
    with httpx.Client(base_url=cluster.url, timeout=PATIENCE_S) as client:
        return Undisturbed.of(client, **REQUEST)


@pytest.mark.parametrize("part", ["transformer", "vae.decoder"])
def test_jobs_finish_on_a_new_replica_with_the_same_pictures(
    part: str,
    cluster: RayCluster,
    orders: Path,
    client: httpx.Client,
    undisturbed: Undisturbed,
    record_property: Callable[[str, object], None],
) -> None:
    began = time.monotonic()
    job_ids = [submit(client, **REQUEST) for _ in range(2)]
    (before,) = cluster.replicas(MODEL)
    until(lambda: client.get(f"/api/generate/{job_ids[0]}").json()["step"] > 5, "the jobs run")

    breaking_app.order(orders, part)
    jobs = [ended(client, job_id) for job_id in job_ids]

    record_property("recovery_s", time.monotonic() - began - undisturbed.seconds)
    assert [job["status"] for job in jobs] == ["completed", "completed"], jobs
    assert not (orders / part).exists(), "the device broke"
    (after,) = until(lambda: cluster.replicas(MODEL), "a replica runs")
    assert after["pid"] != before["pid"]
    assert all(picture(client, job).tobytes() == undisturbed.image.tobytes() for job in jobs)
