"""`serve deploy serve_config.yaml` on a Ray cluster that was started separately, with its own REDIS_URL."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from serve_app.redis.embedded import EmbeddedRedis
from tests.graph.calls import ended, submit
from tests.graph.running import RAY, ROOT, free_port, until
from tests.patience import patience

pytestmark = pytest.mark.ray

SCRIPTS = Path(sys.executable).parent


@dataclass(frozen=True)
class Cluster:
    dashboard: str  # address
    log: Path  # what `ray start` said


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Ray head started by `ray start`, with REDIS_URL in its environment."""
    data = tmp_path_factory.mktemp("cluster")
    short = tempfile.mkdtemp()  # Ray puts unix sockets far below it, and their paths end at 107 bytes
    dashboard = free_port()
    ports = {"--port": free_port(), "--dashboard-port": dashboard, "--ray-client-server-port": free_port()}
    command = [
        str(SCRIPTS / "ray"),
        "start",
        "--head",
        "--block",
        "--num-cpus=4",
        f"--temp-dir={short}",
    ]
    command += [f"{flag}={port}" for flag, port in ports.items()]
    command += [f"--dashboard-agent-listen-port={free_port()}", "--node-ip-address=127.0.0.1"]
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("WEFT_", "REDIS_", "RAY_"))}
    with EmbeddedRedis(data) as url:
        environment = clean | {"REDIS_URL": url, "WEFT_DATA_DIR": str(data)} | RAY
        log = data / "ray_start.log"
        with log.open("w") as file:
            environment["PYTHONPATH"] = str(ROOT)
            head = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield Cluster(f"http://127.0.0.1:{dashboard}", log)
        finally:
            family = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
            head.terminate()
            psutil.wait_procs(family, timeout=patience())
            for process in family:
                if process.is_running():
                    process.kill()
            head.kill()
            head.wait()
            shutil.rmtree(short, ignore_errors=True)


def test_serve_deploy_on_a_running_cluster_serves_pictures(cluster: Cluster, tmp_path: Path) -> None:
    port = free_port()
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"]["port"] = port
    file = tmp_path / "serve_config.yaml"
    file.write_text(yaml.safe_dump(config))

    def deployed() -> bool:
        command = [str(SCRIPTS / "serve"), "deploy", "-a", cluster.dashboard, str(file)]
        environment = {n: v for n, v in os.environ.items() if not n.startswith("RAY_")}
        environment |= RAY
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0

    def ready() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
        except httpx.TransportError:
            return False

    until(deployed, f"the cluster takes the config; see {cluster.log}")
    until(ready, "the graph is ready")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=patience(2)) as client:
        assert ended(client, submit(client, prompt="a red circle"))["status"] == "completed"
