"""A new version of the application on a running Ray cluster, while callers go on calling."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from tests.graph.calls import ended, submit
from tests.graph.clusters import RayCluster
from tests.graph.running import PATIENCE_S, until

pytestmark = pytest.mark.ray

MODEL = "slow-flux"
DEPLOYMENTS = ("Ingress", "Dispatcher", "Adapters", MODEL)


class Callers:
    """Two that submit jobs and ask for them until they end, and two that wait for their pictures."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self.finished: list[str] = []
        self.failures: list[str] = []

    @contextmanager
    def calling(self) -> Iterator[None]:
        """They call in this block, and end what they have begun."""
        with ThreadPoolExecutor(4) as pool:
            for call in (self._poll, self._poll, self._wait, self._wait):
                pool.submit(self._again_and_again, call)
            try:
                yield
            finally:
                self._stop.set()

    def _again_and_again(self, call: object) -> None:
        assert callable(call)
        with httpx.Client(base_url=self._url, timeout=PATIENCE_S) as client:
            while not self._stop.is_set():
                try:
                    self.finished.append(call(client))
                except Exception as error:
                    self.failures.append(f"{type(error).__name__}: {error}")

    def _poll(self, client: httpx.Client) -> str:
        job = ended(client, submit(client, model=MODEL, prompt="a red circle"))
        assert job["status"] == "completed", job
        return "polled"

    def _wait(self, client: httpx.Client) -> str:
        body = {"model": MODEL, "prompt": "a blue circle", "response_format": "b64_json"}
        answer = client.post("/v1/images/generations", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["data"][0]["b64_json"]
        return "waited"


def test_every_replica_is_replaced_and_no_call_fails(ray_cluster: RayCluster) -> None:
    args = {"models": [MODEL], "ingresses": 2, "dispatchers": 2}

    def ids() -> dict[str, set[str]]:
        return {
            name: {replica["replica_id"] for replica in ray_cluster.replicas(name)} for name in DEPLOYMENTS
        }

    ray_cluster.serve(ray_cluster.config(args=args))
    until(lambda: len(ids()["Ingress"]) == len(ids()["Dispatcher"]) == 2, "two of each run", every_s=0.5)
    before = ids()
    callers = Callers(ray_cluster.url)
    with callers.calling():
        until(lambda: {"polled", "waited"} <= {*callers.finished}, "callers are served", every_s=0.2)

        # settings are arguments: with other ones Serve replaces all replicas
        ray_cluster.deploy(ray_cluster.config(args=args | {"settings": {"events_kept": 128}}))

        def replaced() -> bool:
            now = ids()
            return all(now[name] and not now[name] & before[name] for name in DEPLOYMENTS)

        until(replaced, "every replica is a new one", every_s=0.5)
        reached = len(callers.finished)
        until(lambda: len(callers.finished) >= reached + 4, "callers are served again", every_s=0.2)

    assert callers.failures == []
    assert {*callers.finished} == {"polled", "waited"}
