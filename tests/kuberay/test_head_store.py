"""Ray's head keeps its state in the Valkey that configs/kuberay ships, as the user whom its list admits."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
import yaml
from ray._private.services import GCS_SERVER_EXECUTABLE, serialize_config

from serve_app.redis.embedded import find_server
from tests.graph.running import free_port
from tests.patience import patience

FOLDER = Path(__file__).parents[2] / "configs/kuberay"


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    def answers() -> bool:
        with socket.socket() as tried:
            return tried.connect_ex(("127.0.0.1", port)) == 0

    wait_until(answers, process, log)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + patience(3)
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.05)
    pytest.fail(f"exit status {process.poll()}: {log.read_text(errors='replace')[-3000:]}")


@contextmanager
def store(folder: Path, name: str) -> Iterator[int]:
    """The port of the Valkey of that StatefulSet, with its shipped options and the secrets in the folder."""
    manifests = list(yaml.safe_load_all((FOLDER / "valkey.yaml").read_text(encoding="utf-8")))
    (spec,) = [
        one["spec"]["template"]["spec"]
        for one in manifests
        if (one["kind"], one["metadata"]["name"]) == ("StatefulSet", name)
    ]
    (program, _, *options) = spec["containers"][0]["args"]
    assert program == "valkey-server"
    data = folder / name
    data.mkdir()
    shutil.copy(folder / f"secrets/{name}.acl", data / "users.acl")
    port, config, log = free_port(), data / "valkey.conf", data / "valkey.log"
    shipped = (FOLDER / "valkey.conf").read_text()
    here = shipped.replace("port 6379", f"port {port}\nbind 127.0.0.1").replace("/data", str(data))
    config.write_text(here.replace("/etc/valkey-users", str(data)))
    with running([find_server(), str(config), *options], log) as server:
        wait_for_port(port, server, log)
        yield port


@pytest.fixture
def store_of_ray(secrets: Path) -> Iterator[int]:
    with store(secrets, "valkey-ray") as port:
        yield port


@pytest.fixture
def store_of_jobs(secrets: Path) -> Iterator[int]:
    with store(secrets, "valkey") as port:
        yield port


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """A folder with the secrets of an installation, which is tmp_path too."""
    shutil.copy(FOLDER / "secrets.sh", tmp_path)
    subprocess.run(["sh", "secrets.sh"], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def password_of_ray(folder: Path) -> str:
    lines = (folder / "secrets/ray.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)["redis_password"]


def password_of_app(folder: Path) -> str:
    return (folder / "secrets/weft.env").read_text().partition("app:")[2].partition("@")[0]


def head(folder: Path, store_port: int, port: int) -> list[str]:
    """The command line with which Ray starts the process of a head that keeps its state."""
    options = {
        "log_dir": folder,
        "session-dir": folder,
        "session-name": "session_1",
        "config_list": serialize_config({"external_storage_namespace": "weft"}),
        "gcs_server_port": port,
        "metrics-agent-port": 0,
        "node-ip-address": "127.0.0.1",
        "node-id": "0" * 56,
        "redis_address": "127.0.0.1",
        "redis_port": store_port,
        "redis_enable_ssl": "false",
        "redis_username": "ray",
        "redis_password": password_of_ray(folder),
    }
    return [GCS_SERVER_EXECUTABLE, *(f"--{name}={value}" for name, value in options.items())]


def test_a_head_starts_and_keeps_its_state_in_the_shipped_valkey(tmp_path: Path, store_of_ray: int) -> None:
    password = password_of_ray(tmp_path)
    ray = redis.Redis(port=store_of_ray, username="ray", password=password)
    before = None
    for attempt in range(2):  # the second one reads what the first has written
        port, log = free_port(), tmp_path / f"head{attempt}.log"
        with running(head(tmp_path, store_of_ray, port), log) as process:
            wait_for_port(port, process, log)
            wait_until(lambda: any(True for _ in ray.scan_iter("RAY*")), process, log)
            assert b"NOPERM" not in log.read_bytes()
        kept = set(ray.scan_iter("RAY*"))
        assert before is None or before <= kept
        before = kept


def test_each_store_admits_its_own_user_and_keys_only(
    tmp_path: Path, store_of_ray: int, store_of_jobs: int
) -> None:
    password_ray, password_app = password_of_ray(tmp_path), password_of_app(tmp_path)
    ray = redis.Redis(port=store_of_ray, username="ray", password=password_ray)
    app = redis.Redis(port=store_of_jobs, username="app", password=password_app)

    ray.set("RAYweft@INTERNAL_CONFIG", "1")
    app.set("weft:job", "1")

    for client, key in ((ray, "weft:job"), (app, "RAYweft@INTERNAL_CONFIG"), (app, "DUMMY")):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.set(key, "1")
    for client in (ray, app):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.flushall()
    stranger = redis.Redis(port=store_of_jobs, username="ray", password=password_ray)
    with pytest.raises(redis.exceptions.AuthenticationError):
        stranger.ping()
