"""configs/clusters/Caddyfile, run by Caddy in front of an application of ours that says what it was sent."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tests.graph.running import free_port
from tests.patience import patience

CADDY = shutil.which("caddy")
FILE = Path(__file__).parents[2] / "configs/clusters/Caddyfile"

pytestmark = pytest.mark.skipif(CADDY is None, reason="needs caddy")


class Echo(BaseHTTPRequestHandler):
    """Answers with the headers and the size of the body that it was sent; or with events, one by one."""

    go_on = threading.Event()  # sends the second event

    def do_POST(self) -> None:
        size = len(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        self._answer("application/json")
        self.wfile.write(json.dumps({"headers": dict(self.headers), "size": size}).encode())

    def do_GET(self) -> None:
        self._answer("text/event-stream")
        self.wfile.write(b"data: 1\n\n")
        self.wfile.flush()
        self.go_on.wait(patience(2))
        self.wfile.write(b"data: 2\n\n")

    def _answer(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of Caddy; without TLS, for which it would need a name of the internet."""
    folder, port = tmp_path_factory.mktemp("caddy"), free_port()
    url = f"http://127.0.0.1:{port}"
    assert CADDY is not None
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            "HOME": str(folder),
            "WEFT_PUBLIC_URL": url,
            "SERVE_PORT": str(server.server_port),
            "CADDY_ADMIN": f"unix/{folder}/admin",
        }
        command = [CADDY, "run", "--adapter", "caddyfile", "--config", str(FILE)]
        with (folder / "log").open("wb") as log:
            caddy = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + patience(2)
            while caddy.poll() is None and time.monotonic() < deadline:
                with socket.socket() as tried:
                    if tried.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            else:
                pytest.fail((folder / "log").read_text())
            yield url
        finally:
            caddy.kill()
            caddy.wait()
            server.shutdown()


def test_callers_are_named_by_caddy_and_not_by_themselves(address: str) -> None:
    forged = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Host": "evil.example"}

    headers = httpx.post(f"{address}/api/generate", headers=forged).json()["headers"]

    assert headers["X-Forwarded-For"] == "127.0.0.1"
    assert headers["X-Forwarded-Host"] == address.removeprefix("http://")
    assert headers["X-Forwarded-Proto"] == "http"


@pytest.mark.parametrize(
    ("path", "mib", "status"),
    [("/api/generate", 32, 200), ("/api/generate", 33, 413), ("/api/loras", 33, 200)],
)
def test_bodies_are_limited_before_weft_holds_them(address: str, path: str, mib: int, status: int) -> None:
    answer = httpx.post(f"{address}{path}", content=bytes(mib * 2**20), timeout=patience(2))

    assert answer.status_code == status


def test_events_pass_as_they_come(address: str) -> None:
    Echo.go_on.clear()

    with httpx.stream("GET", f"{address}/events", timeout=patience(2)) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        Echo.go_on.set()
        rest = [line for line in lines if line]

    assert (first, rest) == ("data: 1", ["data: 2"])
