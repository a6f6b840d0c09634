"""What is removed after its retention time, and what is not."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from pathlib import Path

import pytest
from redis.asyncio import Redis

from deployments.protocol.errors import NotFound
from deployments.protocol.request import Edit, GenerationRequest
from serve_app.job_ids import new_job_id
from serve_app.jobs.job import Job, JobState, NewJob, SubmitOptions
from serve_app.jobs.service import JobService
from serve_app.jobs.store.key_names import Keys
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.jobs.worker.maintenance import Maintenance
from serve_app.jobs.worker.retention import Retention
from serve_app.redis.transactions import StoreUnreachable
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from tests.patience import patience
from tests.serving.fakes import MODEL, OWNER, eventually, keys_without_ttl, picture, resolved
from tests.serving.jobs.test_dispatch import ended, submitted
from tests.serving.jobs.test_webhooks import URL, Receiver

DAY_S = 86_400.0


@pytest.fixture
def keys(settings: Settings) -> Keys:
    return Keys(settings.redis_prefix)


@pytest.fixture
def retention(store: JobStore, results: ResultStore) -> Retention:
    return Retention(store.file_expiry, results, DAY_S)


async def a_day_passes(redis: Redis, keys: Keys, job: Job) -> None:
    """As if the server's clock had jumped; no other clock is read."""
    assert await redis.zscore(keys.expiring, job.id) == pytest.approx((job.completed_at + DAY_S) * 1e6)
    await redis.zadd(keys.expiring, {job.id: 1})


def files(results: Path) -> list[Path]:
    return [path for path in results.rglob("*") if path.is_file()]


async def test_files_are_removed_after_a_day_and_the_record_stays(
    store: JobStore,
    dispatcher: Dispatcher,
    service: JobService,
    retention: Retention,
    redis: Redis,
    keys: Keys,
    tmp_path: Path,
) -> None:
    old = await ended(store, await submitted(store))
    young = await ended(store, await submitted(store))
    early = await retention.sweep()
    await a_day_passes(redis, keys, old)

    swept = [await retention.sweep(), await retention.sweep()]

    kept = (await service.get(old.id, OWNER)).job
    assert (early, swept) == (0, [1, 0])
    assert (kept.state, kept.files_expired, kept.artifacts) == (JobState.completed, True, ())
    assert {path.parent.name for path in files(tmp_path / "results")} == {young.id}
    with pytest.raises(NotFound):
        await service.artifact(old.id, OWNER, 0)


async def test_a_sweep_that_was_interrupted_is_finished_by_the_next(
    store: JobStore, dispatcher: Dispatcher, retention: Retention, redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    job = await ended(store, await submitted(store))
    await a_day_passes(redis, keys, job)
    await store.file_expiry.expire(job.id)

    await retention.sweep()

    assert files(tmp_path / "results") == []
    assert await redis.zcard(keys.expiring) == 0


async def test_files_whose_record_expired_first_are_removed_too(
    store: JobStore, dispatcher: Dispatcher, retention: Retention, redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    job = await ended(store, await submitted(store))
    await a_day_passes(redis, keys, job)
    await redis.delete(keys.job(job.id))

    await retention.sweep()

    assert files(tmp_path / "results") == []


async def test_orphans_are_removed_when_no_job_could_need_them(
    store: JobStore, results: ResultStore, dispatcher: Dispatcher, retention: Retention, tmp_path: Path
) -> None:
    job = await ended(store, await submitted(store))
    old, young = new_job_id(), new_job_id()
    for job_id in (old, young):
        await results.put(f"inputs/{job_id}/image", picture())
    for job_id in (old, job.id):
        for place in ("inputs", "outputs"):
            folder = tmp_path / "results" / place / job_id
            if folder.exists():
                os.utime(folder, (1, 1))

    removed = await retention.sweep_orphans()

    assert removed == 1
    assert {path.parent.name for path in files(tmp_path / "results")} == {job.id, young}


async def test_a_deleted_job_leaves_no_file_and_no_key_of_its_own(
    store: JobStore,
    dispatcher: Dispatcher,
    service: JobService,
    redis: Redis,
    settings: Settings,
    tmp_path: Path,
) -> None:
    request = GenerationRequest(model=MODEL, prompt="x", edit=Edit(image=picture()))
    job = await ended(store, (await service.submit(request, OWNER)).id)

    await service.delete(job.id, OWNER)

    assert files(tmp_path / "results") == []
    assert [key async for key in redis.scan_iter(f"*{job.id}*")] == []
    assert await keys_without_ttl(redis, settings.redis_prefix) == []


async def test_a_maintenance_task_is_acquired_by_one_dispatcher_at_a_time(store: JobStore) -> None:
    assert [await store.try_acquire("sweep", 60.0) for _ in range(3)] == [True, False, False]
    assert await store.try_acquire("orphans", 60.0)


async def test_a_maintenance_task_of_a_dead_dispatcher_is_acquired_by_another_in_time(
    store: JobStore, redis: Redis, keys: Keys
) -> None:
    await store.try_acquire("sweep", 60.0)

    assert 0 < await redis.pttl(keys.maintenance_lock("sweep")) <= 60_000


async def test_one_round_of_maintenance_delivers_and_sweeps(
    store: JobStore, results: ResultStore, settings: Settings, redis: Redis, keys: Keys
) -> None:
    job = await store.accept(NewJob(new_job_id(), OWNER, resolved(), options=SubmitOptions(webhook=URL)))
    await store.cancel(job.id)
    await redis.zadd(keys.expiring, {job.id: 1})
    receiver = Receiver()

    await Maintenance(store, results, receiver, settings).run_once()

    assert len(receiver.posted) == 1
    assert (await store.get(job.id)).files_expired


async def test_rounds_of_maintenance_sweep_once_a_minute(
    store: JobStore, results: ResultStore, settings: Settings, redis: Redis, keys: Keys
) -> None:
    maintenance = Maintenance(store, results, Receiver(), settings)
    await maintenance.run_once()
    job = await store.accept(NewJob(new_job_id(), OWNER, resolved()))
    await store.cancel(job.id)
    await redis.zadd(keys.expiring, {job.id: 1})

    await maintenance.run_once()
    early = (await store.get(job.id)).files_expired
    await redis.delete(keys.maintenance_lock("sweep"))
    await maintenance.run_once()

    assert (early, (await store.get(job.id)).files_expired) == (False, True)
    assert await redis.exists(keys.maintenance_lock("orphans"))


async def test_a_cancellation_that_the_client_swallows_ends_maintenance(
    store: JobStore, results: ResultStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does while it connects; the loop went on for ever."""
    connecting = asyncio.Event()

    async def connect(_name: str, _for_s: float) -> bool:
        connecting.set()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(patience())
        return False

    monkeypatch.setattr(store, "try_acquire", connect)
    task = asyncio.create_task(Maintenance(store, results, Receiver(), settings).run())
    await connecting.wait()
    task.cancel()
    connecting.clear()
    await connecting.wait()  # the round goes on to its next call
    task.cancel()

    done, _ = await asyncio.wait({task}, timeout=patience())
    assert done
    assert task.cancelled()


@pytest.mark.parametrize("error", [StoreUnreachable("gone"), RuntimeError("a bug")])
async def test_no_error_ends_maintenance(
    store: JobStore,
    results: ResultStore,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    receiver = Receiver()
    maintenance = Maintenance(store, results, receiver, settings)
    monkeypatch.setattr("serve_app.jobs.worker.maintenance.ROUND_S", 0.02)
    acquire, errors = store.try_acquire, [error, error]

    async def failing_acquire(name: str, for_s: float) -> bool:
        if errors:
            raise errors.pop()
        return await acquire(name, for_s)

    monkeypatch.setattr(store, "try_acquire", failing_acquire)
    job = await store.accept(NewJob(new_job_id(), OWNER, resolved(), options=SubmitOptions(webhook=URL)))

    with caplog.at_level(logging.INFO):
        task = asyncio.create_task(maintenance.run())
        await eventually(lambda: not errors)
        await store.cancel(job.id)
        await eventually(lambda: len(receiver.posted) == 1)
        task.cancel()

    kinds = {"maintenance waits: gone", "a maintenance task failed; it is tried again later"}
    assert len([message for message in caplog.messages if message in kinds]) == 2
