"""A job service, and dispatchers that run for the length of a test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from serve_app.jobs.service import JobService
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from tests.serving.fakes import CARD, FakeModels


@asynccontextmanager
async def running(dispatcher: Dispatcher) -> AsyncIterator[Dispatcher]:
    """A running dispatcher until the block ends."""
    task = asyncio.create_task(dispatcher.run())
    try:
        yield dispatcher
    finally:
        await dispatcher.drain()
        await task


@pytest.fixture
def models() -> FakeModels:
    return FakeModels()


@pytest.fixture
async def dispatcher(
    store: JobStore, results: ResultStore, models: FakeModels, settings: Settings
) -> AsyncIterator[Dispatcher]:
    async with running(Dispatcher(store, results, models, settings)) as dispatcher:
        yield dispatcher


@pytest.fixture
async def service(store: JobStore, results: ResultStore, settings: Settings) -> AsyncIterator[JobService]:
    service = JobService(store, results, {CARD.id: CARD}, settings)
    yield service
    await service.aclose()
