"""A head that the commands of the units start: it deploys, and comes back after a crash."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from serve_app.redis.embedded import EmbeddedRedis, find_server
from tests.graph.running import PATIENCE_S, ROOT, free_port, until

pytestmark = pytest.mark.ray

TOKEN = "0123456789abcdef" * 4


class Head:
    """A node's home and its processes, as systemd would run them."""

    def __init__(self, home: Path, redis_url: str, state_port: int) -> None:
        self.home = home
        home.mkdir()
        names = ("gcs", "dashboard", "agent", "client", "http", "objects")
        self.ports = {name: free_port() for name in names}
        self._temp = tempfile.mkdtemp()  # Ray's unix sockets lie far below it; their paths end at 107 bytes
        weft = home / "weft"
        shutil.copytree(ROOT / "configs/clusters", weft / "configs/clusters")
        (weft / ".venv").symlink_to(Path(sys.executable).parent.parent)
        (home / ".ray").mkdir()
        (home / ".ray/auth_token").write_text(TOKEN)
        environment = {
            "REDIS_URL": redis_url,
            "RAY_REDIS_ADDRESS": f"127.0.0.1:{state_port}",
            "WEFT_DATA_DIR": home,
            "WEFT_MODEL_CACHE": home / "cache",
            "PYTHONPATH": ROOT,
            "RAY_worker_niceness": 0,
        }
        (weft / ".env").write_text("".join(f"{name}={value}\n" for name, value in environment.items()))
        (weft / "fleet.yaml").write_text(yaml.safe_dump(self._serve_config()))
        (home / "ray_bootstrap_config.yaml").write_text(json.dumps(autoscaling()))
        (weft / "ray.env").write_text(  # as units.sh does
            "export RAY_enable_autoscaler_v2=1 RAY_CLOUD_INSTANCE_ID=i-1"
            """ RAY_OVERRIDE_RESOURCES='{"CPU":8,"GPU":0,"front":100}'\n"""
        )
        self._ray: subprocess.Popen[bytes] | None = None
        self._http = httpx.Client(timeout=PATIENCE_S, headers={"Authorization": f"Bearer {TOKEN}"})

    def start(self) -> None:
        """weft-ray@head."""
        ports = self.ports
        options = {
            "port": ports["gcs"],
            "object-manager-port": ports["objects"],
            "dashboard-port": ports["dashboard"],
            "dashboard-agent-listen-port": ports["agent"],
            "ray-client-server-port": ports["client"],
            "node-ip-address": "127.0.0.1",
            "object-store-memory": 100 * 2**20,
            "temp-dir": self._temp,
        }
        command = [*self._script("node.sh"), "head", "--disable-usage-stats"]
        command += [f"--{name}={value}" for name, value in options.items()]
        with (self.home / "head.log").open("ab") as log:
            self._ray = subprocess.Popen(
                command, env=self._environment(), cwd=self.home, stdout=log, stderr=log
            )

    def deploy(self) -> None:
        """weft-deploy: again until it succeeds. Returns when Weft answers."""
        command = [*self._script("deploy.sh"), "fleet.yaml", f"--address={self._dashboard}"]

        def deployed() -> bool:
            assert self._ray is not None
            assert self._ray.poll() is None, (self.home / "head.log").read_text()[-3000:]
            with (self.home / "deploy.log").open("ab") as log:
                return not subprocess.run(
                    command, env=self._environment(), stdout=log, stderr=log, check=False
                ).returncode

        until(deployed, f"the fleet is deployed; see {self.home}/deploy.log", every_s=1.0)
        until(self.answers, f"it answers; see {self.home}/head.log", every_s=0.5)

    def answers(self) -> bool:
        with suppress(httpx.TransportError):
            return self._http.get(f"http://127.0.0.1:{self.ports['http']}/health").status_code == 200
        return False

    def ingress(self) -> int:
        """Process id of the replica that answers HTTP."""
        found = self._http.get(f"{self._dashboard}/api/serve/applications/").json()
        (replica,) = found["applications"]["weft"]["deployments"]["Ingress"]["replicas"]
        return int(replica["pid"])

    def crash(self) -> int:
        """kill -9 of the process with the cluster's state. Returns the exit status of the unit's command."""
        assert self._ray is not None
        (state,) = [one for one in self._processes() if one.name() == "gcs_server"]
        state.send_signal(signal.SIGKILL)
        status = self._ray.wait(PATIENCE_S)
        self.stop()
        return status

    def stop(self) -> None:
        """As systemd: whatever is left of the unit is killed."""
        left = self._processes()
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=PATIENCE_S)
        if self._ray is not None:
            self._ray.wait(PATIENCE_S)

    def close(self) -> None:
        self.stop()
        self._http.close()
        shutil.rmtree(self._temp, ignore_errors=True)

    @property
    def _dashboard(self) -> str:
        return f"http://127.0.0.1:{self.ports['dashboard']}"

    def _script(self, name: str) -> list[str]:
        return ["sh", str(self.home / "weft/configs/clusters" / name)]

    def _environment(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "HOME": str(self.home), "UNIT": str(self.home)}

    def _processes(self) -> list[psutil.Process]:
        """All that the unit started, by the variable that they inherit."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("UNIT") == str(self.home):
                    found.append(process)
        return found

    def _serve_config(self) -> dict[str, Any]:
        """The gateway of the fleet, without models."""
        config: dict[str, Any] = yaml.safe_load((ROOT / "configs/serve/fleet.yaml").read_text())
        config["http_options"]["port"] = self.ports["http"]
        config["applications"] = config["applications"][:1]
        for deployment in config["applications"][0]["deployments"]:
            deployment.pop("num_replicas", None)
        return config


def autoscaling() -> dict[str, Any]:
    """For Ray's autoscaler, which looks at the cluster and can start no node."""
    lists = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "weft-units",
        "max_workers": 0,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "provider": {"type": "readonly"},
        "available_node_types": {"head": {"resources": {"CPU": 8}, "node_config": {}, "max_workers": 0}},
        "head_node_type": "head",
        "auth": {},
        "docker": {},
        **{f"{name}_commands": [] for name in lists},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    state_port = free_port()
    options = f"--bind 127.0.0.1 --port {state_port} --dir {tmp_path} --appendonly yes"
    jobs = EmbeddedRedis(tmp_path)
    with subprocess.Popen(
        [find_server(), *options.split()], env={"LC_ALL": "C"}, stdout=subprocess.DEVNULL
    ) as state:
        made = Head(tmp_path / "home", jobs.start(), state_port)
        try:
            yield made
        finally:
            made.close()
            jobs.stop()
            state.kill()


def test_a_head_deploys_and_after_a_crash_has_its_applications_back_by_itself(
    head: Head, record_property: Callable[[str, object], None]
) -> None:
    head.start()
    head.deploy()
    before = head.ingress()

    status = head.crash()
    crashed = time.monotonic()
    assert status != 0, "systemd starts again what failed"
    assert not head.answers()
    head.start()
    until(head.answers, f"it answers; see {head.home}/head.log", every_s=0.5)

    record_property("head_back_s", time.monotonic() - crashed)
    after = head.ingress()
    assert after != before
    head.deploy()
    assert head.ingress() == after, "what runs stays as it is"
