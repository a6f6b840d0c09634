"""Every accepted job ends once, whatever single process dies. `make chaos` runs it longer."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.protocol.errors import Overloaded
from serve_app.job_ids import new_job_id
from serve_app.jobs.job import Job, JobState, NewJob
from serve_app.jobs.store.store import JobStore
from serve_app.redis.embedded import EmbeddedRedis
from serve_app.redis.transactions import connect
from serve_app.settings import Settings
from tests.chaos.runner import ROOT, Chaos
from tests.chaos.worker import POISON
from tests.patience import patience, slowness
from tests.serving.conftest import MakeSettings, make_settings  # noqa: F401  # a fixture
from tests.serving.fakes import OWNER, eventually, resolved

SEEDS = [int(seed) for seed in os.environ.get("CHAOS_SEEDS", "1").split(",")]
JOBS = int(os.environ.get("CHAOS_JOBS", "25"))


@pytest.mark.parametrize("seed", SEEDS)
async def test_every_accepted_job_ends_once_though_processes_die_at_random(seed: int, tmp_path: Path) -> None:
    report = await Chaos(tmp_path, seed, jobs=JOBS).run()

    assert (report.lost, report.double, report.unreadable) == (0, 0, 0), report
    assert report.states == {JobState.completed: JOBS}


async def test_a_job_that_kills_its_worker_three_times_fails_and_others_continue(
    tmp_path: Path,
    make_settings: MakeSettings,  # noqa: F811
) -> None:
    settings = make_settings(lease_s=1.0 * slowness(), heartbeat_s=0.2)
    with EmbeddedRedis(tmp_path / "store") as url:
        async with connect(url) as redis:
            store = JobStore(redis, settings)
            poison = await store.accept(NewJob(new_job_id(), OWNER, resolved(POISON)))
            for _ in range(3):
                done = await asyncio.to_thread(work, url, settings, patience(2))
                assert done != 0
            worker = start_worker(url, settings)
            other = await store.accept(NewJob(new_job_id(), OWNER, resolved()))

            async def both_ended() -> bool:
                return all([(await store.get(job.id)).state.ended for job in (poison, other)])

            await eventually(both_ended, quiet_s=2)
            states = [(await store.get(job.id)).state for job in (poison, other)]
            worker.kill()
            worker.wait()

    assert states == [JobState.failed, JobState.completed]


def start_worker(url: str, settings: Settings) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.chaos.worker", url, settings.model_dump_json()]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)


def work(url: str, settings: Settings, limit_s: float) -> int:
    """The exit status of a worker that runs until something kills it."""
    worker = start_worker(url, settings)
    try:
        return worker.wait(limit_s)
    finally:
        worker.kill()
        worker.wait()


async def test_a_full_disk_under_the_store_rejects_jobs_and_loses_none(
    tmp_path: Path,
    make_settings: MakeSettings,  # noqa: F811
) -> None:
    server = EmbeddedRedis(tmp_path / "store")
    settings = make_settings(max_pending=10_000, max_active_per_owner=10_000)
    async with connect(server.start()) as redis:
        store = JobStore(redis, settings)
        ids = [(await store.accept(NewJob(new_job_id(), OWNER, resolved()))).id for _ in range(5)]
        files = (tmp_path / "store").rglob("*.aof")
        size = max(file.stat().st_size for file in files)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size + 8192, size + 8192))

        refused = 0
        while not refused:
            try:
                ids.append((await store.accept(NewJob(new_job_id(), OWNER, resolved()))).id)
            except Overloaded:
                refused += 1

        async def is_back() -> bool:
            try:
                await store.ping()
            except Overloaded:
                return False
            return True

        await eventually(is_back, quiet_s=2)
        states = {(await store.get(job_id)).state for job_id in ids}
    server.stop()

    assert states == {JobState.queued}


async def test_a_full_disk_under_the_results_fails_the_job_and_leaves_no_partial_file(
    tmp_path: Path,
    make_settings: MakeSettings,  # noqa: F811
) -> None:
    settings = make_settings(max_attempts=1)
    with EmbeddedRedis(tmp_path / "store") as url:
        async with connect(url) as redis:
            store = JobStore(redis, settings)
            worker = start_worker(url, settings)

            async def job() -> Job:
                job_id = (await store.accept(NewJob(new_job_id(), OWNER, resolved()))).id

                async def has_ended() -> bool:
                    return (await store.get(job_id)).state.ended

                await eventually(has_ended, quiet_s=2)
                return await store.get(job_id)

            before = await job()
            _, most = resource.prlimit(worker.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (64, most))
            full = await job()
            resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (most, most))
            after = await job()
            worker.kill()
            worker.wait()
            kept = await asyncio.to_thread(
                lambda: {path.parent.name for path in tmp_path.rglob("outputs/*/*")}
            )

    assert [job.state for job in (before, full, after)] == [
        JobState.completed,
        JobState.failed,
        JobState.completed,
    ]
    assert full.error is not None
    assert "stored" in full.error.message
    assert kept == {before.id, after.id}


async def test_a_store_whose_last_write_was_torn_starts_with_all_earlier_writes(
    tmp_path: Path,
    make_settings: MakeSettings,  # noqa: F811
) -> None:
    settings = make_settings()
    server = EmbeddedRedis(tmp_path / "store")
    async with connect(server.start()) as redis:
        store = JobStore(redis, settings)
        ids = [(await store.accept(NewJob(new_job_id(), OWNER, resolved()))).id for _ in range(5)]
    server.stop()
    log = next(file for file in (tmp_path / "store").rglob("*.incr.aof"))
    os.truncate(log, log.stat().st_size - 7)

    again = EmbeddedRedis(tmp_path / "store")
    async with connect(again.start()) as redis:
        store = JobStore(redis, settings)
        found = [(await store.get(job_id)).state for job_id in ids[:-1]]
    again.stop()

    assert found == [JobState.queued] * 4
