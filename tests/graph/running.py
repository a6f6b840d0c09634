"""A running Weft, and patience with it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray

from serve_app.redis.embedded import EmbeddedRedis
from tests.patience import patience

ROOT = Path(__file__).parent.parent.parent
PATIENCE_S = patience(8)
RAY = {
    "RAY_AUTH_MODE": "disabled",  # else a token file is written to the home directory
    "RAY_worker_niceness": "0",  # else other processes of the suite get the CPU first
}


@dataclass
class Service:
    """A running Weft."""

    url: str
    valkey: EmbeddedRedis
    config: dict[str, Any]  # as it was deployed
    lost: str = ""  # the test before which it had stopped answering for good

    def require(self, test: str) -> None:
        """Fails at once, or after PATIENCE_S the first time, when no test can use the service any more."""
        if not self.lost:
            deadline = time.monotonic() + PATIENCE_S
            while time.monotonic() < deadline:
                if self.ready():
                    return
                time.sleep(0.2)
            self.lost = test
        pytest.fail(f"the service was not ready before {self.lost}; see the test before that")

    def ready(self) -> bool:
        with self.client() as client, suppress(httpx.TransportError):
            return client.get("/ready").status_code == 200
        return False

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S)

    def pid_of(self, deployment: str) -> int:
        """Process id of one running replica; Ray names the process after its actor."""
        pids: list[int] = until(lambda: self.pids_of(deployment), f"a replica of {deployment} runs")
        return pids[0]

    def pids_of(self, deployment: str) -> list[int]:
        """Process ids of all its running replicas."""
        return self.pids_with(f"ServeReplica:weft:{deployment}")

    def pids_with(self, title: str) -> list[int]:
        """Process ids of all running actors of this service with this in their title."""
        return [pid for pid, line in _command_lines(self.valkey.url) if title in line]

    def stop_gracefully(self, deployment: str) -> None:
        """What Serve's controller does to one replica when it scales down; returns when it has drained."""
        prefix = f"SERVE_REPLICA::weft#{deployment}#"
        names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
        (name,) = [name for name in names if name.startswith(prefix)]
        replica = ray.get_actor(name, namespace="serve")
        ray.get(replica.perform_graceful_shutdown.remote(), timeout=PATIENCE_S)


def _command_lines(redis_url: str) -> Iterator[tuple[int, str]]:
    """Of our processes that use this store: another test's Ray may run beside."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.environ().get("REDIS_URL") == redis_url:
                yield process.pid, " ".join(process.cmdline())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], Any], what: str, every_s: float = 0.05) -> Any:
    """The condition's first true value. Fails after PATIENCE_S, saying what did not happen."""
    deadline = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while time.monotonic() < deadline:
        if value := condition():
            return value
        pause.wait(every_s)
    pytest.fail(f"did not happen within {PATIENCE_S:.0f} s: {what}")


def kill(pid: int) -> None:
    """kill -9, and wait until the process is gone."""
    process = psutil.Process(pid)
    process.kill()
    psutil.wait_procs([process], timeout=patience())
