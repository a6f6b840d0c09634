"""Whatever node dies, and while a new version is deployed: accepted jobs finish, with the same pictures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import httpx
import pytest

from serve_app.settings import Settings
from tests.graph.calls import Undisturbed, picture, submit
from tests.graph.clusters import RayCluster
from tests.graph.running import PATIENCE_S, until

pytestmark = pytest.mark.ray

Record = Callable[[str, object], None]
MODEL = "slow-flux"
MAX_ATTEMPTS = Settings().max_attempts
REQUEST = {"model": MODEL, "prompt": "a red circle", "num_inference_steps": 300, "seed": 5}


def patient_get(client: httpx.Client, path: str) -> dict[str, object]:
    """The JSON there; empty while no server answers."""
    try:
        answer = client.get(path)
    except httpx.TransportError:
        return {}
    return dict(answer.json()) if answer.status_code == 200 else {}


def running_job(client: httpx.Client, **changes: object) -> str:
    job_id = submit(client, **(REQUEST | changes))
    until(lambda: client.get(f"/api/generate/{job_id}").json()["step"] > 5, "the job runs")
    return job_id


def completed(client: httpx.Client, job_id: str) -> dict[str, object]:
    def look() -> dict[str, object] | None:
        job = patient_get(client, f"/api/generate/{job_id}")
        assert job.get("status") not in ("failed", "cancelled"), job
        return job if job.get("status") == "completed" else None

    return dict(until(look, f"job {job_id} completes", every_s=0.2))


@pytest.fixture
def client(ray_cluster: RayCluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=ray_cluster.url, timeout=PATIENCE_S) as made:
        yield made


@pytest.fixture
def undisturbed(client: httpx.Client) -> Undisturbed:
    return Undisturbed.of(client, **REQUEST)


def test_a_job_survives_kill_9_of_its_node(
    ray_cluster: RayCluster, client: httpx.Client, undisturbed: Undisturbed, record_property: Record
) -> None:
    ray_cluster.add_worker("spare")
    began = time.monotonic()
    job_id = running_job(client)
    (before,) = ray_cluster.replicas(MODEL)

    ray_cluster.kill_worker_of(before["node_id"])
    job = completed(client, job_id)
    record_property("recovery_node_s", time.monotonic() - began - undisturbed.seconds)

    (after,) = ray_cluster.replicas(MODEL)
    assert after["node_id"] != before["node_id"]
    assert picture(client, job).tobytes() == undisturbed.image.tobytes()


def test_a_job_outlives_more_nodes_than_it_has_attempts(
    ray_cluster: RayCluster, client: httpx.Client, undisturbed: Undisturbed
) -> None:
    job_id = running_job(client, seed=7)
    for lost in range(MAX_ATTEMPTS + 1):
        (replica,) = until(lambda: ray_cluster.replicas(MODEL), "a replica runs", every_s=0.5)
        ray_cluster.add_worker(f"spare-{lost}")
        ray_cluster.kill_worker_of(replica["node_id"])
        until(partial(others, ray_cluster, replica), "a replica on another node", every_s=0.5)
        until(lambda: steps_of(client, job_id) > 5, "the job runs again", every_s=0.2)

    completed(client, job_id)


def others(cluster: RayCluster, lost: dict[str, object]) -> bool:
    found = cluster.replicas(MODEL)
    return bool(found) and all(replica["node_id"] != lost["node_id"] for replica in found)


def steps_of(client: httpx.Client, job_id: str) -> int:
    job = patient_get(client, f"/api/generate/{job_id}")
    assert job.get("status") not in ("failed", "cancelled"), job
    return int(str(job.get("step", 0))) if job.get("status") == "processing" else 0


def test_a_job_survives_kill_9_of_the_gcs_and_the_head_with_it(
    ray_cluster: RayCluster, client: httpx.Client, undisturbed: Undisturbed, record_property: Record
) -> None:
    began = time.monotonic()
    job_id = running_job(client)
    (before,) = ray_cluster.replicas(MODEL)

    ray_cluster.kill_gcs()
    killed = time.monotonic()
    ray_cluster.start_head()  # as Kubernetes does
    record_property("recovery_head_up_s", time.monotonic() - killed)
    job = completed(client, job_id)
    record_property("recovery_head_s", time.monotonic() - began - undisturbed.seconds)

    def serves() -> bool:
        return [replica["pid"] for replica in ray_cluster.replicas(MODEL)] == [before["pid"]]

    until(serves, "the replica on the other node, which lived on, is Serve's again", every_s=0.5)
    assert picture(client, job).tobytes() == undisturbed.image.tobytes()


def test_a_new_version_deployed_under_load_loses_no_accepted_job(
    ray_cluster: RayCluster, client: httpx.Client, undisturbed: Undisturbed, record_property: Record
) -> None:
    jobs = [running_job(client)]
    before = {name: pids(ray_cluster, name) for name in ("Ingress", "Dispatcher", MODEL)}
    updated = threading.Event()

    def load() -> None:
        with httpx.Client(base_url=ray_cluster.url, timeout=PATIENCE_S) as own:
            while not updated.wait(0.5):
                try:
                    answer = own.post("/api/generate/image", json=REQUEST | {"num_inference_steps": 50})
                except httpx.TransportError:
                    continue  # not accepted
                if answer.status_code == 202:
                    jobs.append(answer.json()["id"])

    callers = threading.Thread(target=load)
    callers.start()
    began = time.monotonic()
    try:
        ray_cluster.deploy(ray_cluster.config(args={"models": [MODEL], "settings": {"heartbeat_s": 0.4}}))

        def replaced() -> bool:
            now = {name: pids(ray_cluster, name) for name in before}
            return all(now[name] and now[name].isdisjoint(before[name]) for name in before)

        until(replaced, "every replica is a new one", every_s=0.5)
        record_property("rolling_update_s", time.monotonic() - began)
    finally:
        updated.set()
        callers.join()
    done = [completed(client, job_id) for job_id in jobs]
    record_property("rolling_update_jobs", len(jobs))

    assert len(jobs) > 2
    assert picture(client, done[0]).tobytes() == undisturbed.image.tobytes()


def pids(cluster: RayCluster, deployment: str) -> set[int]:
    return {replica["pid"] for replica in cluster.replicas(deployment)}
