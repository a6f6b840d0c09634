"""What `weft doctor` finds in a safe installation, and in unsafe ones."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr

from serve_app.cli import doctor
from serve_app.cli.findings import Finding, Level
from serve_app.cli.main import main
from serve_app.cli.ray_ports import Listener, ray_findings, ray_listeners
from serve_app.redis.embedded import EmbeddedRedis
from serve_app.redis.info import RedisInfo, query_info
from serve_app.settings import Settings

SAFE = RedisInfo("9.1", True, "always", "noeviction", False, False, False, 0.01)
KEY = SecretStr("k" * 43)


def texts(findings: Iterable[Finding], level: Level) -> str:
    return "\n".join(finding.text for finding in findings if finding.level is level)


@pytest.fixture
def port_of() -> type[type[http.server.BaseHTTPRequestHandler]]:
    """A service that answers /health, and everything else with `status`."""

    class Answers(http.server.BaseHTTPRequestHandler):
        status = 200
        kind = "application/json"

        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else type(self).status)
            self.send_header("content-type", type(self).kind)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return Answers


def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> http.server.ThreadingHTTPServer:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


def test_the_embedded_store_is_as_safe_as_we_say(valkey_url: str, settings: Settings) -> None:
    info = query_info(valkey_url, settings.redis_prefix)

    assert (info.aof, info.scripts, info.foreign_keys, info.admin) == (True, False, False, False)
    assert info.eviction == "noeviction"
    assert abs(info.clock_ahead_s) < 5
    assert texts(doctor.store_findings(info, "always"), Level.fail) == ""
    assert texts(doctor.store_findings(info, "always"), Level.warn) == ""


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"aof": False}, Level.fail, "appendonly yes"),
        ({"aof": None}, Level.warn, "appendonly"),
        ({"appendfsync": "everysec"}, Level.warn, "loses power"),
        ({"eviction": "allkeys-lru"}, Level.fail, "noeviction"),
        ({"scripts": True, "admin": True}, Level.warn, "run scripts, reconfigure"),
        ({"clock_ahead_s": 60.0}, Level.fail, "60.0 s apart"),
        ({"clock_ahead_s": -2.0}, Level.warn, "2.0 s apart"),
    ],
)
def test_an_unsafe_store_is_named(change: dict[str, object], level: Level, words: str) -> None:
    findings = [*doctor.store_findings(replace(SAFE, **change), None)]  # type: ignore[arg-type]

    assert words in texts(findings, level)


def test_a_store_that_is_not_there_cannot_be_asked(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        query_info(f"unix://{tmp_path}/none.sock", "weft:")


def test_a_service_for_others_without_a_key_fails(settings: Settings) -> None:
    locked = settings.model_copy(update={"api_key": KEY})
    weak = settings.model_copy(update={"api_key": SecretStr("hunter2")})

    assert "set WEFT_API_KEY" in texts(doctor.key_findings(settings, "0.0.0.0"), Level.fail)
    assert texts(doctor.key_findings(settings, "127.0.0.1"), Level.fail) == ""
    assert texts(doctor.key_findings(locked, "0.0.0.0"), Level.fail) == ""
    assert "under 24 characters" in texts(doctor.key_findings(weak, "0.0.0.0"), Level.warn)


def test_a_running_service_that_lets_strangers_in_fails(
    port_of: type[http.server.BaseHTTPRequestHandler],
) -> None:
    server = serving(port_of)
    port = server.server_port

    auth_disabled = [*doctor.service_findings("127.0.0.1", port, has_key=True)]
    port_of.status = 401  # type: ignore[attr-defined]
    locked = [*doctor.service_findings("127.0.0.1", port, has_key=True)]
    server.shutdown()
    server.server_close()

    assert "callers without a key get 200" in texts(auth_disabled, Level.fail)
    assert texts(locked, Level.fail) == ""
    assert "401" in texts(locked, Level.ok)


def test_a_dashboard_without_a_token_fails(port_of: type[http.server.BaseHTTPRequestHandler]) -> None:
    server = serving(port_of)
    dashboard = Listener("dashboard", "127.0.0.1", server.server_port, has_token=True)

    unlocked = [*ray_findings([dashboard])]
    port_of.status = 401  # type: ignore[attr-defined]
    locked = [*ray_findings([dashboard])]
    port_of.status, port_of.kind = 200, "text/plain"  # type: ignore[attr-defined]
    metrics = [*ray_findings([dashboard])]
    server.shutdown()
    server.server_close()

    assert "RAY_AUTH_MODE=token" in texts(unlocked, Level.fail)
    assert texts(locked, Level.fail) == ""
    assert texts(metrics, Level.fail) == ""


@pytest.mark.parametrize(
    ("program", "address", "has_token", "level", "words"),
    [
        ("raylet", "::", False, Level.fail, "raylet on *:7, and no token is required there"),
        ("gcs_server", "192.0.2.7", False, Level.fail, "gcs_server on 192.0.2.7:7"),
        ("ray::ServeReplica:weft:Ingress", "::", True, Level.warn, "with Ray's token only"),
        ("monitor", "0.0.0.0", True, Level.warn, "metrics are among these ports"),
        (
            "raylet",
            "::ffff:127.0.0.1",
            False,
            Level.ok,
            "1 ports of Ray can be reached from this machine only",
        ),
        ("ray::ProxyActor", "0.0.0.0", True, Level.ok, ""),
    ],
)
def test_a_port_of_ray_is_named_with_those_who_can_reach_it(
    program: str, address: str, has_token: bool, level: Level, words: str
) -> None:
    findings = [*ray_findings([Listener(program, address, 7, has_token)])]

    assert words in texts(findings, level)
    assert all(finding.level is level for finding in findings)


LISTENING = """
import socket, sys
servers = [socket.create_server((address, 0)) for address in ("0.0.0.0", "127.0.0.1")]
print(*(server.getsockname()[1] for server in servers), flush=True)
sys.stdin.read()
"""


def test_the_ports_that_are_really_used_are_found(tmp_path: Path) -> None:
    program = tmp_path / "ray" / "autoscaler" / "_private" / "monitor.py"
    program.parent.mkdir(parents=True)
    program.write_text(LISTENING)

    with subprocess.Popen(
        [sys.executable, str(program)],
        env={**os.environ, "RAY_AUTH_MODE": "token"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        everywhere, local = map(int, process.stdout.readline().split())
        found = {listener.port: listener for listener in ray_listeners()}
        ours = {listener.port for listener in ray_listeners(os.getpid())}
        others = ray_listeners(process.pid)
        process.communicate("")

    assert found[everywhere] == Listener("monitor", "0.0.0.0", everywhere, has_token=True)
    assert found[local].is_local
    assert {everywhere, local} <= ours
    assert others == []
    assert not found[everywhere].is_local


def test_a_damaged_store_at_rest_is_found(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with EmbeddedRedis(settings.data_dir):
        pass
    (base,) = (settings.data_dir / "valkey" / "appendonlydir").glob("*.base.rdb")
    base.unlink()
    monkeypatch.setenv("WEFT_DATA_DIR", str(settings.data_dir))
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setattr(doctor, "ray_listeners", lambda _: [])

    status = main(["doctor", "--port", "1"])

    assert status == 1
    assert f"fail  the job store is damaged: {base} is missing; run weft repair" in capsys.readouterr().out


def test_a_distant_store_wants_a_password_and_a_closed_way() -> None:
    naked = [*doctor.transport_findings("redis://store.example/0")]

    assert "password" in texts(naked, Level.fail)
    assert "rediss" in texts(naked, Level.warn)
    assert [*doctor.transport_findings("rediss://app:secret@store.example/0")] == []
    assert [*doctor.transport_findings("redis://127.0.0.1/0")] == []


def test_a_full_disk_and_a_readable_secret_fail(settings: Settings) -> None:
    (settings.data_dir / "api_key").write_text("secret")
    (settings.data_dir / "api_key").chmod(0o644)
    greedy = settings.model_copy(update={"min_free_bytes": 2**60})

    assert "free some space" in texts(doctor.disk_findings(greedy), Level.fail)
    assert "chmod 600" in texts(doctor.secret_file_findings(settings.data_dir), Level.fail)


def test_the_command_ends_with_a_count_and_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], valkey_url: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("REDIS_URL", valkey_url)
    monkeypatch.setenv("WEFT_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(doctor, "own_addresses", list)
    monkeypatch.setattr(doctor, "ray_listeners", lambda _: [])  # what else runs on this machine
    monkeypatch.setattr(doctor, "RAY_TOKEN", tmp_path / "auth_token")

    safe = main(["doctor", "--port", "1"])
    unsafe = main(["doctor", "--host", "0.0.0.0", "--port", "1"])

    lines = capsys.readouterr().out.splitlines()
    assert (safe, unsafe) == (0, 1)
    assert sum("checks:" in line for line in lines) == 2
    assert any(line.startswith("fail  no key is set") for line in lines)
