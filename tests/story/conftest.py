"""Fixtures of the tutorial: the shipped model, a real Valkey, a job service with a dispatcher. No Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path

import pytest
import torch

from deployments.protocol.card import ModelCard, load_cards
from deployments.protocol.events import Event
from deployments.protocol.request import ResolvedRequest
from deployments.replica import ModelReplica
from serve_app.jobs.service import JobService
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.redis.embedded import EmbeddedRedis
from serve_app.services import Services
from serve_app.settings import ROOT, Settings

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def card() -> ModelCard:
    return load_cards(ROOT / "configs" / "models")["tiny-flux-schnell"]


@pytest.fixture(scope="session")
def model(card: ModelCard) -> ModelReplica:
    return ModelReplica([card])


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedRedis(tmp_path_factory.mktemp("story")) as url:
        yield url


class OneModel:
    """What a dispatcher calls: here a single model replica in the same process."""

    def __init__(self, model: ModelReplica, model_id: str) -> None:
        self._model = model
        self._model_id = model_id

    def free_slots(self) -> Mapping[str, int]:
        return {self._model_id: 8}

    async def generate(
        self, _model_id: str, request: ResolvedRequest, /, *, user: str = "", resume: bytes | None = None
    ) -> AsyncGenerator[Event]:
        async with aclosing(self._model.generate(request, user, resume)) as events:
            async for event in events:
                yield event


@pytest.fixture
async def job_service(
    card: ModelCard, model: ModelReplica, valkey: str, tmp_path: Path
) -> AsyncIterator[JobService]:
    """A job service whose jobs a dispatcher runs."""
    prefix = f"weft:{tmp_path.name}:"
    settings = Settings.load(redis_url=valkey, data_dir=tmp_path, redis_prefix=prefix, min_free_bytes=0)
    services = Services.open(settings)
    job_service = services.job_service({card.id: card})
    dispatcher = Dispatcher(services.store, services.results, OneModel(model, card.id), settings)
    running = asyncio.create_task(dispatcher.run())
    yield job_service
    await job_service.aclose()
    await dispatcher.drain()
    await running
    await services.store.redis.aclose()
