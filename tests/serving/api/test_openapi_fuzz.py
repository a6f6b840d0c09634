"""No call, allowed or forbidden by the OpenAPI description, is answered with a 500."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import SearchStrategy
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import positive_data_acceptance

from serve_app.api.app import create_app
from serve_app.api.state import ApiState
from serve_app.jobs.service import JobService
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.redis.transactions import connect
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from tests.patience import patience
from tests.serving.api.cards import CARDS
from tests.serving.api.fake_model import FakeModel

START_LIMIT_S = patience(2)
CALL_LIMIT_S = patience(2)
EXAMPLES = 4  # per route and mode
# replaced below: a 503 with Retry-After is a valid answer
EXCLUDED = [not_a_server_error]
# a body is also checked against a model's card and its other fields, which no schema expresses
EXCLUDED_THERE = [not_a_server_error, positive_data_acceptance]
# in a list only what a list gave is one; the ends of a period depend on each other, too
CURSORS = {"cursor", "after", "from", "to"}
NOTHING_TO_BEND = (Unsatisfiable,)  # a route that takes nothing cannot be called wrongly


class Service(threading.Thread):
    """The app with a fake model behind a real socket, on an event loop of its own."""

    def __init__(self, valkey_url: str, folder: Path) -> None:
        super().__init__(daemon=True)
        self._valkey_url = valkey_url
        self._folder = folder
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.server: uvicorn.Server | None = None
        self.ready = threading.Event()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        async def model_states() -> dict[str, str]:
            return dict.fromkeys(CARDS, "ready")

        limits = {"max_pending": 100_000, "max_active_per_owner": 100_000, "min_free_bytes": 0}
        settings = Settings(data_dir=self._folder, redis_prefix="weft:fuzz:", ui=False, **limits)  # type: ignore[arg-type]
        async with connect(self._valkey_url) as redis:
            store, results = JobStore(redis, settings), ResultStore(str(self._folder / "results"), 0)
            job_service = JobService(store, results, CARDS, settings)
            dispatcher = Dispatcher(store, results, FakeModel(), settings)
            working = asyncio.create_task(dispatcher.run())
            app = create_app(
                ApiState(
                    job_service=job_service,
                    cards=CARDS,
                    settings=settings,
                    model_states=model_states,
                    accounts=redis,
                )
            )
            self.server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
            self.ready.set()
            await self.server.serve(sockets=[self._listener])
            await dispatcher.drain()
            await working
            await job_service.aclose()


@pytest.fixture(scope="module")
def service(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(valkey_url, tmp_path_factory.mktemp("fuzz"))
    service.start()
    assert service.ready.wait(START_LIMIT_S)
    yield service
    assert service.server is not None
    service.server.should_exit = True
    service.server.force_exit = True
    service.join(START_LIMIT_S)


@pytest.fixture(scope="module")
def api(service: Service) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json", wait_for_schema=START_LIMIT_S)


@pytest.mark.parametrize(
    "mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "not valid"]
)
def test_every_call_is_answered_as_described(api: schemathesis.BaseSchema, mode: GenerationMode) -> None:
    faults: list[str] = []
    calls = 0

    for found in api.get_all_operations():
        operation = found.ok()
        if operation.path == "/mcp":  # JSON-RPC, which mcp's own client tries
            continue
        try:
            calls += called(operation.as_strategy(generation_mode=mode))
        except NOTHING_TO_BEND:
            continue
        except (AssertionError, FailureGroup, Failure) as fault:
            faults.append(f"{operation.label}: {fault}")

    assert calls > 60
    assert not faults, "\n\n".join(faults)


def called(cases: SearchStrategy[schemathesis.Case]) -> int:
    """Send a few of these and hold each answer against the description; how many."""
    sent = 0

    @given(case=cases)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    def call(case: schemathesis.Case) -> None:
        nonlocal sent
        sent += 1
        answer = case.call(timeout=CALL_LIMIT_S)
        others_decide = len(case.operation.body) > 0 or not CURSORS.isdisjoint(case.query)
        case.validate_response(answer, excluded_checks=EXCLUDED_THERE if others_decide else EXCLUDED)
        assert answer.status_code < 500 or (answer.status_code == 503 and "retry-after" in answer.headers)

    call()
    return sent
