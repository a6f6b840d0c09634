"""kill -9 of the store or of a dispatcher during a job: the job still finishes, once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from deployments.protocol.errors import Overloaded
from serve_app.jobs import events
from serve_app.jobs.job import JobState, NewJob
from serve_app.jobs.service import JobService
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.redis.embedded import EmbeddedRedis
from serve_app.redis.transactions import connect
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from tests.patience import patience, slowness
from tests.serving.conftest import MakeSettings
from tests.serving.fakes import CARD, MODEL, OWNER, FakeModels, eventually, picture, resolved
from tests.serving.jobs.conftest import running
from tests.serving.jobs.test_dispatch import before_the_last_step, ended, submitted
from tests.serving.jobs.test_job_service import REQUEST

DOOMED = """
import asyncio, sys
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.jobs.store.store import JobStore
from serve_app.redis.transactions import connect
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from tests.serving.fakes import FakeModels

async def main(url, settings):
    models = FakeModels()
    models.gate.clear()
    settings = Settings.model_validate_json(settings)
    store = JobStore(connect(url), settings)
    await Dispatcher(store, ResultStore(settings.results_root), models, settings).run()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A server that may be killed."""
    server = EmbeddedRedis(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def redis(own_valkey: EmbeddedRedis) -> AsyncIterator[Redis]:
    async with connect(own_valkey.url) as client:
        yield client


def kill(server: EmbeddedRedis) -> None:
    os.kill(server.pid, signal.SIGKILL)


async def endings(store: JobStore, job_id: str) -> int:
    entries = await store.events(job_id)
    return sum(isinstance(event, events.ENDINGS) for _, event in entries)


async def test_a_job_survives_the_death_of_the_store(
    store: JobStore,
    dispatcher: Dispatcher,
    models: FakeModels,
    own_valkey: EmbeddedRedis,
    service: JobService,
) -> None:
    models.gate.clear()
    job_id = (await service.submit(REQUEST, OWNER)).id
    await before_the_last_step(store, models, job_id)
    story = asyncio.create_task(collected(service, job_id))

    kill(own_valkey)
    models.gate.set()
    job = await service.wait(job_id, OWNER, patience())

    assert (job.state, job.attempt, len(models.requests)) == (JobState.completed, 1, 1)
    assert await endings(store, job_id) == 1
    assert (await service.artifact(job_id, OWNER, 0))[1] == picture()
    assert isinstance((await asyncio.wait_for(story, patience()))[-1], events.JobCompleted)


async def collected(service: JobService, job_id: str) -> list[events.Event]:
    return [event async for _, event in service.follow(job_id, OWNER)]


async def test_work_continues_after_an_outage_and_no_accepted_job_is_lost(
    store: JobStore, dispatcher: Dispatcher, own_valkey: EmbeddedRedis
) -> None:
    ids: list[str] = []
    refused = 0
    for number in range(30):
        if number in (10, 20):
            kill(own_valkey)
        try:
            ids.append(await submitted(store))
        except Overloaded:
            refused += 1
            await asyncio.sleep(0.02)

    await answering(store)
    states = [(await ended(store, job_id)).state for job_id in ids]

    assert refused
    assert set(states) == {JobState.completed}
    assert [await endings(store, job_id) for job_id in ids] == [1] * len(ids)


async def answering(store: JobStore) -> None:
    async def answers() -> bool:
        try:
            await store.ping()
        except Overloaded:
            return False
        return True

    await eventually(answers)


async def test_an_unreachable_store_is_an_overload_error(
    store: JobStore, results: ResultStore, settings: Settings, own_valkey: EmbeddedRedis
) -> None:
    service = JobService(store, results, {MODEL: CARD}, settings)
    own_valkey.stop()

    for call in (service.submit(REQUEST, OWNER), service.list(OWNER), service.health()):
        with pytest.raises(Overloaded, match="not reachable") as refusal:
            await asyncio.wait_for(call, patience())
        assert refusal.value.retry_after_s


async def test_a_job_survives_the_death_of_its_dispatcher(
    own_valkey: EmbeddedRedis, redis: Redis, make_settings: MakeSettings, tmp_path: Path
) -> None:
    settings = make_settings(lease_s=0.6 * slowness(), heartbeat_s=0.1, results_url=str(tmp_path / "results"))
    store, results = JobStore(redis, settings), ResultStore(settings.results_root)
    job_id = (await store.accept(NewJob("a" * 32, OWNER, resolved()))).id
    arguments = (own_valkey.url, settings.model_dump_json())
    doomed = await asyncio.create_subprocess_exec(sys.executable, "-c", DOOMED, *arguments)
    models = FakeModels()
    await before_the_last_step(store, models, job_id)

    doomed.send_signal(signal.SIGKILL)
    await doomed.wait()
    async with running(Dispatcher(store, results, models, settings)):
        job = await ended(store, job_id)

    assert (job.state, job.attempt, job.failures) == (JobState.completed, 2, 1)
    assert await endings(store, job_id) == 1
    assert await results.get(job.artifacts[0].path, sha256=job.artifacts[0].sha256) == picture()


async def test_a_zombie_dispatcher_changes_nothing(
    own_valkey: EmbeddedRedis, redis: Redis, make_settings: MakeSettings, tmp_path: Path
) -> None:
    settings = make_settings(lease_s=0.6 * slowness(), heartbeat_s=0.1, results_url=str(tmp_path / "results"))
    store, results = JobStore(redis, settings), ResultStore(settings.results_root)
    job_id = (await store.accept(NewJob("b" * 32, OWNER, resolved()))).id
    arguments = (own_valkey.url, settings.model_dump_json())
    zombie = await asyncio.create_subprocess_exec(sys.executable, "-c", DOOMED, *arguments)
    models = FakeModels()
    await before_the_last_step(store, models, job_id)

    zombie.send_signal(signal.SIGSTOP)
    async with running(Dispatcher(store, results, models, settings)):
        job = await ended(store, job_id)
    zombie.send_signal(signal.SIGCONT)
    zombie.send_signal(signal.SIGTERM)
    await zombie.wait()

    assert await store.get(job_id) == job
    assert (job.state, job.attempt) == (JobState.completed, 2)
    assert await endings(store, job_id) == 1
