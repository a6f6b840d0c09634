"""The real app over the real job service, store and results; only the model is a fake."""

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr

from serve_app.api.app import create_app
from serve_app.api.state import ApiState
from serve_app.jobs.service import JobService
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.loras.builtin import BuiltInLoras
from serve_app.services import Services
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from tests.patience import patience
from tests.serving.api.cards import CARDS
from tests.serving.api.fake_model import FakeModel
from tests.serving.api.fake_video_model import FRAMEWISE, WAN, FakeVideoModel
from tests.serving.conftest import MakeSettings

KEY = "correct horse battery"
JWT_SECRET = "0123456789abcdef" * 4


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    return make_settings(ui=False, sync_wait_s=patience(), max_call_s=patience(2))


async def _no_replicas(digest: str) -> None:
    """There are no replicas here."""


@pytest.fixture
async def state(store: JobStore, results: ResultStore, settings: Settings) -> AsyncIterator[ApiState]:
    async def model_states() -> dict[str, str]:
        return {"sketch": "ready", "tiny-flux-schnell": "loading"}

    job_service = JobService(store, results, CARDS, settings)
    lora_service = Services(settings, store, results).lora_service(BuiltInLoras(CARDS.values()), _no_replicas)
    yield ApiState(
        job_service=job_service,
        cards=CARDS,
        settings=settings,
        model_states=model_states,
        lora_service=lora_service,
        accounts=store.redis,
    )
    await job_service.aclose()


@pytest.fixture
async def fake_model(store: JobStore, results: ResultStore, settings: Settings) -> AsyncIterator[FakeModel]:
    """The model, at work: jobs are finished as they come."""
    fake_model = FakeModel()
    dispatcher = Dispatcher(store, results, fake_model, settings)
    running = asyncio.create_task(dispatcher.run())
    yield fake_model
    fake_model.gate.set()
    await dispatcher.drain()
    await running


@pytest.fixture
async def video_state(store: JobStore, results: ResultStore, settings: Settings) -> AsyncIterator[ApiState]:
    """With models that make videos. A test module uses it by a fixture `state` of its own."""

    async def model_states() -> dict[str, str]:
        return {WAN.id: "ready", FRAMEWISE.id: "asleep", "sketch": "ready"}

    cards = CARDS | {WAN.id: WAN, FRAMEWISE.id: FRAMEWISE}
    job_service = JobService(store, results, cards, settings)
    yield ApiState(job_service=job_service, cards=cards, settings=settings, model_states=model_states)
    await job_service.aclose()


@pytest.fixture
async def fake_video_model(
    store: JobStore, results: ResultStore, settings: Settings
) -> AsyncIterator[FakeVideoModel]:
    fake_video_model = FakeVideoModel()
    dispatcher = Dispatcher(store, results, fake_video_model, settings)  # type: ignore[arg-type]
    running = asyncio.create_task(dispatcher.run())
    yield fake_video_model
    fake_video_model.gate.set()
    await dispatcher.drain()
    await running


@pytest.fixture
def app(state: ApiState, request: pytest.FixtureRequest) -> FastAPI:
    """Open to all on loopback. `locked`: behind KEY; `page`: with the page; `hasty`: waits 0.2 s."""
    changes = {
        "locked": {"api_key": SecretStr(KEY), "jwt_secret": SecretStr(JWT_SECRET)},
        "page": {"ui": True},
        "hasty": {"sync_wait_s": 0.2},
    }
    changed = state.settings.model_copy(update=changes.get(getattr(request, "param", ""), {}))
    return create_app(replace(state, settings=changed))


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as client:
        yield client


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://127.0.0.1", timeout=patience()
    )


@pytest.fixture
async def address(app: FastAPI) -> AsyncIterator[str]:
    """The app behind a real server on a free loopback port: host:port."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, lifespan="off", log_level="error", ws="websockets-sansio")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    server.force_exit = True
    await serving
    listener.close()
