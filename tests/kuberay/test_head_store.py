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


@pytest.fixture
def store_port(tmp_path: Path) -> Iterator[int]:
    """The port of a Valkey with the shipped configuration; its passwords are in tmp_path/secrets."""
    shutil.copy(FOLDER / "secrets.sh", tmp_path)
    subprocess.run(["sh", "secrets.sh"], cwd=tmp_path, check=True, capture_output=True)
    port, config, log = free_port(), tmp_path / "valkey.conf", tmp_path / "valkey.log"
    shipped = (FOLDER / "valkey.conf").read_text()
    here = shipped.replace("port 6379", f"port {port}\nbind 127.0.0.1").replace("/data", str(tmp_path))
    config.write_text(here.replace("/etc/valkey-users", str(tmp_path / "secrets")))
    with running([find_server(), str(config)], log) as server:
        wait_for_port(port, server, log)
        yield port


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


def test_a_head_starts_and_keeps_its_state_in_the_shipped_valkey(tmp_path: Path, store_port: int) -> None:
    password = password_of_ray(tmp_path)
    ray = redis.Redis(port=store_port, username="ray", password=password)
    before = None
    for attempt in range(2):  # the second one reads what the first has written
        port, log = free_port(), tmp_path / f"head{attempt}.log"
        with running(head(tmp_path, store_port, port), log) as process:
            wait_for_port(port, process, log)
            wait_until(lambda: any(True for _ in ray.scan_iter("RAY*")), process, log)
            assert b"NOPERM" not in log.read_bytes()
        kept = set(ray.scan_iter("RAY*"))
        assert before is None or before <= kept
        before = kept


def test_the_users_of_the_store_cannot_touch_the_keys_of_each_other(tmp_path: Path, store_port: int) -> None:
    ray = redis.Redis(port=store_port, username="ray", password=password_of_ray(tmp_path))
    app = redis.Redis(port=store_port, username="app", password=password_of_app(tmp_path))

    for client, key in ((ray, "weft:job"), (app, "RAYweft@INTERNAL_CONFIG"), (app, "DUMMY")):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.set(key, "1")
    for client in (ray, app):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.flushall()
