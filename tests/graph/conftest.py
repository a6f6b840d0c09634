"""One real Serve instance for all tests of this folder: real Ray, real Valkey, trained tiny model."""

from __future__ import annotations

import os
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
import yaml

from serve_app.embedded_redis import EmbeddedRedis

ROOT = Path(__file__).parent.parent.parent
PATIENCE_S = 90.0  # for things that take a second on a quiet machine


@dataclass
class Service:
    """A running Weft."""

    url: str
    valkey: EmbeddedRedis

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S)

    def pid_of(self, deployment: str) -> int:
        """Process id of one running replica; Ray names the process after its actor."""
        title = f"ServeReplica:weft:{deployment}"
        pid: int = until(lambda: _child_called(title), f"a replica of {deployment} runs")
        return pid


def _child_called(title: str) -> int | None:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if title in " ".join(process.cmdline()):
                return process.pid
    return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], Any], what: str) -> Any:
    """The condition's first true value. Fails after PATIENCE_S, saying what did not happen."""
    deadline = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while time.monotonic() < deadline:
        if value := condition():
            return value
        pause.wait(0.05)
    pytest.fail(f"did not happen within {PATIENCE_S:.0f} s: {what}")


@pytest.fixture(scope="session")
def cards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped tiny model as it is, and once more with free steps, so that jobs can last."""
    folder = tmp_path_factory.mktemp("cards")
    card = yaml.safe_load((ROOT / "configs/models/tiny-flux-schnell.yaml").read_text())
    (folder / "tiny-flux-schnell.yaml").write_text(yaml.safe_dump(card))
    slow = card | {"id": "slow-flux", "name": "Slow", "corrects": False}
    slow["steps"] = {"min": 1, "default": 4, "max": 1000}
    (folder / "slow-flux.yaml").write_text(yaml.safe_dump(slow))
    return folder


@pytest.fixture(scope="session")
def service(cards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    data = tmp_path_factory.mktemp("data")
    port = free_port()
    settings = {
        "WEFT_DATA_DIR": str(data),
        "WEFT_CARDS_DIR": str(cards),
        "WEFT_LEASE_S": "3",
        "WEFT_HEARTBEAT_S": "0.5",
        "RAY_AUTH_MODE": "disabled",  # else a token file is written to the home directory
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "PYTHONPATH": str(ROOT),
    }
    before = dict(os.environ)
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"]["port"] = port
    config["applications"][0]["args"] |= {"models": ["tiny-flux-schnell", "slow-flux"], "ingresses": 2}
    os.environ.update(settings)
    valkey = EmbeddedRedis(data)
    try:
        os.environ["REDIS_URL"] = valkey.start()
        from serve_app import local

        with local.ray_on_this_machine(num_cpus=8):
            lines: list[str] = []
            assert local.deploy(config, lines.append), "\n".join(lines)
            yield Service(f"http://127.0.0.1:{port}", valkey)
    finally:
        valkey.stop()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with service.client() as made:
        yield made


def kill(pid: int) -> None:
    """kill -9, and wait until the process is gone."""
    process = psutil.Process(pid)
    process.kill()
    psutil.wait_procs([process], timeout=10)
