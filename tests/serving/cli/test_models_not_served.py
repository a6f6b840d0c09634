"""A start reports how each loaded model runs, and the models that it cannot serve, with the reasons."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import SecretStr

from serve_app.cli.model_report import model_report
from serve_app.settings import Settings

MODELS = {
    "models": [
        {"id": "idle", "failure": None, "plan": None},
        {"id": "later", "failure": None, "plan": {"summary": "all on the device", "loaded": False}},
        {"id": "whole", "failure": None, "plan": {"summary": "int8 transformer: 20.4 GiB", "loaded": True}},
        {"id": "broken", "failure": {"message": "no licence; set HF_TOKEN"}, "plan": None},
    ]
}


class Service(ThreadingHTTPServer):
    """Answers /below/api/models/ to one key."""

    def __init__(self) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = self.headers["Authorization"] == "Bearer right" and self.path == "/below/api/models/"
                self.send_response(200 if known else 401)
                self.end_headers()
                self.wfile.write(json.dumps(MODELS if known else {}).encode())

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    threading.Thread(target=service.serve_forever, daemon=True).start()
    yield service
    service.shutdown()
    service.server_close()


@pytest.mark.parametrize(
    ("key", "reported"),
    [
        ("right", ["whole: int8 transformer: 20.4 GiB", "broken is not served: no licence; set HF_TOKEN"]),
        ("wrong", []),
    ],
)
def test_a_model_that_is_not_served_is_reported_with_the_reason(
    service: Service, key: str, reported: list[str]
) -> None:
    settings = Settings().model_copy(update={"api_key": SecretStr(key)})

    assert list(model_report("0.0.0.0", service.server_port, "/below", settings)) == reported
