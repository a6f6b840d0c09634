"""Ray clusters of several nodes on this machine, beside whatever else runs on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from serve_app.redis.embedded import EmbeddedRedis, find_server
from tests.graph.running import PATIENCE_S, RAY, ROOT, free_port, kill, until
from tests.patience import patience, slowness

SCRIPTS = Path(sys.executable).parent
STORE_MIB = 100  # of one node's object store
LOGICAL = {"CPU": 8, "GPU": 1}  # of a worker; nothing of it need be there


class RayCluster:
    """A head without GPUs that serves HTTP, and workers of one logical GPU each: added by hand, or by Ray's
    autoscaler where `autoscaled` says how many there may be.

    with RayCluster(folder) as cluster: ...

    Jobs are kept in a Valkey of their own; so is what Ray's head knows, unless it is autoscaled. Ends the
    processes that it started, and no others.
    """

    def __init__(self, folder: Path, *, autoscaled: int = 0, **environment: str) -> None:
        self._folder = folder
        self._autoscaled = autoscaled
        self._temp = tempfile.mkdtemp()  # Ray's unix sockets lie far below it; their paths end at 107 bytes
        self._ports = {name: free_port() for name in ("gcs", "dashboard", "agent", "client", "http", "redis")}
        clean = {n: v for n, v in os.environ.items() if not n.startswith(("WEFT_", "REDIS_", "RAY_"))}
        self._environment = clean | {
            "WEFT_DATA_DIR": str(folder),
            "WEFT_CARDS_DIR": str(folder / "cards"),
            "WEFT_LEASE_S": str(3 * slowness()),
            "WEFT_HEARTBEAT_S": "0.5",
            "WEFT_READS_PER_MINUTE": "100000",  # tests ask often
            "WEFT_CACHE": "false",  # a repeated request must run again
            "WEFT_LOGICAL_GPUS": "true",
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
            "PYTHONPATH": str(ROOT),
            **RAY,
            **environment,
        }
        self._http = httpx.Client(timeout=PATIENCE_S)
        self._valkey = EmbeddedRedis(folder)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.url = f"http://127.0.0.1:{self._ports['http']}"
        self.dashboard = f"http://127.0.0.1:{self._ports['dashboard']}"

    def __enter__(self) -> Self:
        try:
            self._environment["REDIS_URL"] = self._valkey.start()
            if not self._autoscaled:
                self._start_redis()
            self.start_head()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def start_head(self) -> None:
        """As KubeRay's container does: the command ends when one of the head's processes does."""
        command = [
            *("--head", "--num-gpus=0", f"--num-cpus={LOGICAL['CPU']}", f"--temp-dir={self._temp}"),
            *(f"--port={self._ports['gcs']}", f"--dashboard-port={self._ports['dashboard']}"),
            f"--ray-client-server-port={self._ports['client']}",
        ]
        extra = {}
        if self._autoscaled:
            command.append(f"--autoscaling-config={self._autoscaling_config()}")
            extra = {
                "RAY_FAKE_CLUSTER": "1",
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            }
        else:
            extra = {
                "RAY_REDIS_ADDRESS": f"127.0.0.1:{self._ports['redis']}",
                "RAY_external_storage_namespace": "weft",
            }
        self._ray_start("head", command, self._ports["agent"], extra, lambda: bool(self.nodes()))

    def add_worker(self, name: str, **environment: str) -> None:
        """Start one. environment: of its processes, beside that of all nodes."""
        before = len(self.nodes())
        resources = [f"--num-cpus={LOGICAL['CPU']}", f"--num-gpus={LOGICAL['GPU']}"]
        address = f"--address=127.0.0.1:{self._ports['gcs']}"

        def started() -> bool:
            return len(self.nodes()) > before

        self._ray_start(name, [address, *resources], free_port(), environment, started)

    def deploy(self, config: Mapping[str, Any]) -> None:
        """What `serve deploy` does. Returns when the cluster has taken the config; it is not yet running."""
        answer = self._http.put(f"{self.dashboard}/api/serve/applications/", json=config)
        assert answer.status_code == 200, answer.text

    def serve(self, config: Mapping[str, Any]) -> None:
        """Deploy, and wait until all of it runs and answers."""
        self.deploy(config)

        def running() -> bool:
            found = self._ask("/api/serve/applications/").get("applications", {})
            failed = {name: one["message"] for name, one in found.items() if one["status"] == "DEPLOY_FAILED"}
            assert not failed, f"{failed}; see {self.log('head')}"
            return {one["status"] for one in found.values()} == {"RUNNING"} and self.ready()

        until(running, f"the graph runs; see {self.log('head')}", every_s=0.5)

    def config(self, **application: Any) -> dict[str, Any]:
        """serve_config.yaml on our port, with these values in its application."""
        config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text(encoding="utf-8"))
        config["http_options"]["port"] = self._ports["http"]
        config["applications"][0].update(application)
        return config

    def card(self, **changes: Any) -> str:
        """The shipped tiny FLUX on a GPU of its own, as slow as a request wants. Returns the card's id."""
        folder = self._folder / "cards"
        folder.mkdir(exist_ok=True)
        card = yaml.safe_load((ROOT / "configs/models/tiny-flux-schnell.yaml").read_text(encoding="utf-8"))
        serving = card["serving"] | {"num_gpus": 1, "lora": "none"} | changes.pop("serving", {})
        card |= {"id": "slow-flux", "corrects": False, "adapters": [], "serving": serving} | changes
        card["steps"] = {"min": 1, "default": 4, "max": 1000}
        (folder / f"{card['id']}.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
        return str(card["id"])

    def ready(self) -> bool:
        try:
            return self._http.get(f"{self.url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    def nodes(self) -> list[str]:
        """Ids of the living nodes, the head's among them; nothing while the head is away."""
        found = self._ask("/api/v0/nodes?detail=1")
        rows = found["data"]["result"]["result"] if found else []
        return [str(row["node_id"]) for row in rows if row["state"] == "ALIVE"]

    def replicas(self, deployment: str, application: str = "weft") -> list[dict[str, Any]]:
        """Its running replicas, with `pid`, `node_id` and `replica_id`; nothing while the head is away."""
        found = self._ask("/api/serve/applications/").get("applications", {})
        deployments = found.get(application, {}).get("deployments", {})
        replicas = deployments.get(deployment, {}).get("replicas", [])
        return [replica for replica in replicas if replica["state"] == "RUNNING"]

    def kill_worker_of(self, node_id: str) -> str:
        """kill -9 of that node's raylet; its workers end with it. Returns the name of the node."""
        for name, process in self._processes.items():
            for child in psutil.Process(process.pid).children(recursive=True):
                if Path(child.name()).name == "raylet" and f"--node_id={node_id}" in child.cmdline():
                    kill(child.pid)
                    process.wait()
                    del self._processes[name]
                    return name
        raise AssertionError(f"no raylet of {node_id} is ours")

    def kill_gcs(self) -> None:
        """kill -9 of the head's GCS; the head falls with it, as in a container. Its workers stay."""
        head = self._processes.pop("head")
        family = psutil.Process(head.pid).children(recursive=True)
        (gcs,) = [process for process in family if process.name() == "gcs_server"]
        kill(gcs.pid)
        head.wait()
        _end_all(family)
        # a new container would not have it; `ray start` would see the workers and think that a head runs
        (Path(self._temp) / "ray_current_cluster").unlink(missing_ok=True)

    def weft(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`weft` on the head, with the environment of its processes."""
        command = [sys.executable, "-m", "serve_app.cli", *arguments]
        environment = self._environment | {"RAY_ADDRESS": f"127.0.0.1:{self._ports['gcs']}"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    def log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _ask(self, path: str) -> dict[str, Any]:
        """The dashboard's answer; empty while it is away."""
        try:
            answer = self._http.get(f"{self.dashboard}{path}")
        except httpx.TransportError:
            return {}
        return answer.json() if answer.status_code == 200 else {}

    def _ray_start(
        self,
        name: str,
        arguments: list[str],
        agent_port: int,
        extra: Mapping[str, str],
        started: Callable[[], bool],
    ) -> None:
        """Run `ray start` until `started`; once more when it was too slow for its own limit of 30 s."""
        command = [str(SCRIPTS / "ray"), "start", "--block", "--node-ip-address=127.0.0.1", *arguments]
        command += [f"--object-store-memory={STORE_MIB * 2**20}"]
        command += [f"--dashboard-agent-listen-port={agent_port}", "--disable-usage-stats"]
        self._launch(name, command, self._environment | extra)

        def look() -> bool:
            if self._processes[name].poll() is not None:
                said = self.log(name).read_text()
                assert "timed out during startup" in said, said
                self._launch(name, command, self._environment | extra)
            return started()

        until(look, f"{name} starts; see {self.log(name)}", every_s=0.5)

    def _start_redis(self) -> None:
        """Where the head keeps what it knows; by TCP, as Ray has no other way."""
        options = f"--bind 127.0.0.1 --port {self._ports['redis']} --dir {self._folder} --appendonly yes"
        self._launch("redis", [find_server(), *options.split()], {"LC_ALL": "C"})

    def _launch(self, name: str, command: list[str], environment: Mapping[str, str]) -> None:
        with self.log(name).open("ab") as file:
            self._processes[name] = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    def _autoscaling_config(self) -> Path:
        """For Ray's autoscaler: nodes are processes on this machine."""
        config = {
            "cluster_name": "weft-test",
            "max_workers": self._autoscaled,
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": 0.05,
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "gcs_address": f"127.0.0.1:{self._ports['gcs']}",
                "launch_multiple": True,
                "head_node_id": FAKE_HEAD_NODE_ID,
            },
            "available_node_types": {
                "ray.head.default": {
                    "resources": {"CPU": LOGICAL["CPU"]},
                    "node_config": {},
                    "max_workers": 0,
                },
                "gpu": {
                    "resources": LOGICAL | {"object_store_memory": STORE_MIB * 2**20},
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": self._autoscaled,
                },
            },
            "head_node_type": "ray.head.default",
            "auth": {},
            "docker": {},
            "initialization_commands": [],
            "setup_commands": [],
            "head_setup_commands": [],
            "worker_setup_commands": [],
            "head_start_ray_commands": [],
            "worker_start_ray_commands": [],
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
        }
        file = self._folder / "autoscaling.json"  # YAML reads it
        file.write_text(json.dumps(config))
        return file

    def _end(self) -> None:
        family = [
            process
            for started in self._processes.values()
            if started.poll() is None
            for process in psutil.Process(started.pid).children(recursive=True)
        ]
        for started in self._processes.values():
            started.kill()
        _end_all(family)
        for started in self._processes.values():
            started.wait()
        self._http.close()
        self._valkey.stop()
        shutil.rmtree(self._temp, ignore_errors=True)


def _end_all(family: list[psutil.Process]) -> None:
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=patience())
