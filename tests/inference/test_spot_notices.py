"""A metadata server answers as each cloud's does, and the node is drained when it announces the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deployments.spot_notices import (
    Notice,
    find_service,
    read_amazon,
    read_azure,
    read_google,
    start_watching,
)
from tests.patience import patience

Answer = Callable[[str, str, dict[str, str]], tuple[int, str]]  # method, path and headers: status and text


class MetadataServer(ThreadingHTTPServer):
    """Answers with `answer`; its address is `url`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answer: Answer = lambda *_: (404, "")


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, MetadataServer)
        headers = {name.lower(): value for name, value in self.headers.items()}
        status, text = self.server.answer(self.command, self.path, headers)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    do_PUT = do_GET  # noqa: N815  names of the base class

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[MetadataServer]:
    with MetadataServer() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


class Amazon:
    """As EC2 with version 2 of its service: no answer without a token."""

    def __init__(self) -> None:
        self.action = ""

    def __call__(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        if path == "/latest/api/token":
            asked = method == "PUT" and "x-aws-ec2-metadata-token-ttl-seconds" in headers
            return (200, "token==") if asked else (405, "")
        if headers.get("x-aws-ec2-metadata-token") != "token==":
            return 401, ""
        found = path == "/latest/meta-data/spot/instance-action" and self.action
        return (200, self.action) if found else (404, "not found")


class Google:
    preempted = "FALSE"

    def __call__(self, _method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        found = (
            path == "/computeMetadata/v1/instance/preempted" and headers.get("metadata-flavor") == "Google"
        )
        return (200, self.preempted) if found else (404, "")


class Azure:
    events = "[]"

    def __call__(self, _method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        if not path.startswith("/metadata/scheduledevents?api-version=") or headers.get("metadata") != "true":
            return 400, '{"error": "Bad request"}'
        return 200, f'{{"DocumentIncarnation": 1, "Events": {self.events}}}'


def test_amazons_notice_has_its_time(server: MetadataServer) -> None:
    server.answer = cloud = Amazon()
    assert find_service(server.url) is read_amazon
    assert read_amazon(server.url) is None

    cloud.action = '{"action": "terminate", "time": "2026-09-18T08:22:00Z"}'

    assert read_amazon(server.url) == Notice("Amazon EC2: terminate", 1789719720.0)


def test_googles_notice_leaves_half_a_minute(server: MetadataServer) -> None:
    server.answer = cloud = Google()
    assert find_service(server.url) is read_google
    assert read_google(server.url) is None

    cloud.preempted = "TRUE"
    notice = read_google(server.url)

    assert notice is not None
    assert 0 < notice.deadline - time.time() <= 30


def test_azures_notice_is_of_the_first_event_that_ends_the_node(server: MetadataServer) -> None:
    server.answer = cloud = Azure()
    assert find_service(server.url) is read_azure
    cloud.events = '[{"EventType": "Freeze", "NotBefore": ""}]'
    assert read_azure(server.url) is None

    at = formatdate(1789719720, usegmt=True)
    cloud.events = f'[{{"EventType": "Preempt", "NotBefore": "{at}"}}]'

    assert read_azure(server.url) == Notice("Azure: Preempt", 1789719720.0)


def test_no_cloud_is_found_where_nothing_or_another_server_answers(server: MetadataServer) -> None:
    assert find_service(server.url) is None
    server.answer = lambda *_: (200, "<html>a page for every path</html>")
    assert find_service(server.url) is None
    assert find_service("http://127.0.0.1:9") is None


def test_the_node_is_drained_once_also_when_an_answer_fails_before(server: MetadataServer) -> None:
    server.answer = cloud = Amazon()
    drained: list[tuple[str, float]] = []
    failed, done = threading.Event(), threading.Event()

    def drain(reason: str, deadline: float) -> None:
        drained.append((reason, deadline))
        if len(drained) == 1:
            failed.set()
            raise RuntimeError("Ray does not drain this node")
        done.set()

    cloud.action = "not JSON"  # at first even the cloud is not recognised
    start_watching(server.url, drain, poll_s=0.01)
    time.sleep(0.1)
    assert drained == []
    cloud.action = '{"action": "stop", "time": "2026-09-18T08:22:00Z"}'

    assert failed.wait(patience())
    assert done.wait(patience())
    assert drained == [("Amazon EC2: stop", 1789719720.0)] * 2


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_the_service_is_not_asked_by_a_proxy(
    server: MetadataServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    server.answer = Google()

    assert find_service(server.url) is read_google
