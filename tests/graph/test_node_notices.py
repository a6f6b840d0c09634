"""A node that its cloud takes back: what runs there goes on elsewhere from where it stands."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from tests.graph.calls import Undisturbed, picture, submit
from tests.graph.clusters import RayCluster
from tests.graph.running import PATIENCE_S, until
from tests.inference.test_spot_notices import Amazon, MetadataServer
from tests.patience import slowness

pytestmark = pytest.mark.ray

NOTICE_S = 60 * slowness()  # Amazon gives 120
STEPS = 1000
REQUEST = {"model": "slow-flux", "prompt": "a red circle", "num_inference_steps": STEPS, "seed": 5}


class TakesOneBack(Amazon):
    """Announces, after `announce`, the end of the node that asks first."""

    def __init__(self) -> None:
        super().__init__()
        self.announced = threading.Event()

    def __call__(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        answer = super().__call__(method, path, headers)
        if path.endswith("instance-action") and self.action:
            self.action = ""
            self.announced.set()
        return answer

    def announce(self) -> None:
        at = datetime.now(UTC) + timedelta(seconds=NOTICE_S)
        self.action = json.dumps({"action": "terminate", "time": at.isoformat()})


@pytest.fixture
def cloud() -> Iterator[tuple[MetadataServer, TakesOneBack]]:
    with MetadataServer() as server:
        server.answer = cloud = TakesOneBack()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server, cloud
        server.shutdown()


def test_a_job_goes_on_elsewhere_before_its_node_is_taken_back(
    tmp_path_factory: pytest.TempPathFactory,
    cloud: tuple[MetadataServer, TakesOneBack],
    record_property: Callable[[str, object], None],
) -> None:
    server, service = cloud
    folder = tmp_path_factory.mktemp("spot")
    with RayCluster(folder, WEFT_METADATA_URL=server.url) as cluster:
        cluster.add_worker("first")
        model = cluster.card(serving={"min_replicas": 1})
        cluster.serve(cluster.config(args={"models": [model]}))
        cluster.add_worker("second")
        with httpx.Client(base_url=cluster.url, timeout=PATIENCE_S) as client:
            undisturbed = Undisturbed.of(client, **REQUEST)
            (before,) = cluster.replicas(model)
            job_id = submit(client, **REQUEST)
            until(lambda: job(client, job_id)["step"] > STEPS // 10, "the job runs", every_s=0.1)

            service.announce()
            began = time.monotonic()
            reached = 0

            def moved() -> bool:
                nonlocal reached
                now = job(client, job_id)
                nodes = {replica["node_id"] for replica in cluster.replicas(model)}
                if before["node_id"] in nodes or not nodes:
                    reached = now["step"]
                    return False
                return now["status"] == "completed" or now["step"] > 0

            until(moved, "the replica is on the other node", every_s=0.1)
            record_property("drain_s", time.monotonic() - began)
            after = job(client, job_id)
            done = until(lambda: completed(client, job_id), "the job completes", every_s=0.2)

            assert service.announced.is_set()
            assert after["step"] >= 0.85 * reached  # of what was computed, at most 15 % is computed again
            assert picture(client, done).tobytes() == undisturbed.image.tobytes()


def job(client: httpx.Client, job_id: str) -> dict[str, Any]:
    found = dict(client.get(f"/api/generate/{job_id}").json())
    assert found["status"] not in ("failed", "cancelled"), found
    return found


def completed(client: httpx.Client, job_id: str) -> dict[str, Any] | None:
    found = job(client, job_id)
    return found if found["status"] == "completed" else None
