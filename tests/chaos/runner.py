"""Jobs while dispatchers and the store are killed and stopped at random; then broken promises are counted."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from redis.exceptions import RedisError

from deployments.protocol.errors import Overloaded, WeftError
from serve_app.job_ids import new_job_id
from serve_app.jobs import events
from serve_app.jobs.job import IdempotencyKey, JobState, NewJob, SubmitOptions
from serve_app.jobs.store.key_names import Keys
from serve_app.jobs.store.store import JobStore
from serve_app.redis.embedded import EmbeddedRedis
from serve_app.redis.transactions import connect
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from tests.patience import patience, slowness
from tests.serving.fakes import resolved

ROOT = Path(__file__).resolve().parents[2]
LEASE_S = 1.5 * slowness()
ZOMBIE_S = 2.5 * slowness()  # past the lease: another worker has the job by then
SETTLE_S = patience(4)


@dataclass
class ChaosReport:
    """Faults that were injected, and what became of the jobs."""

    seed: int
    accepted: int = 0
    refused: int = 0
    lost: int = 0  # accepted, and no record or no ending
    double: int = 0  # more than one ending
    unreadable: int = 0  # completed, and a file is missing or not the one that was written
    kills: dict[str, int] = field(default_factory=lambda: {"worker": 0, "zombie": 0, "store": 0, "hang": 0})
    recovery_s: dict[str, list[float]] = field(default_factory=dict)  # by what was struck; see _recovered
    states: dict[str, int] = field(default_factory=dict)

    @property
    def broken(self) -> int:
        return self.lost + self.double + self.unreadable


class Chaos:
    """One run in its own folder."""

    def __init__(self, folder: Path, seed: int, *, jobs: int, workers: int = 3, hang_s: float = 3.0) -> None:
        self.report = ChaosReport(seed)
        self._random = random.Random(seed)
        self._server = EmbeddedRedis(folder / "store")
        self._settings = Settings(
            _env_file=None,
            data_dir=folder,
            lease_s=LEASE_S,
            heartbeat_s=0.3,
            max_attempts=1000,  # the workers are killed by the test, not by the jobs
            max_pending=10_000,
            max_active_per_owner=10_000,
        )
        self._jobs = jobs
        self._hang_s = hang_s
        self._number = workers
        self._workers: list[subprocess.Popen[bytes]] = []
        self._ids: list[str] = []
        self._struck = asyncio.Event()
        self._watchers: set[asyncio.Task[None]] = set()

    async def run(self) -> ChaosReport:
        """The report, once every accepted job has ended or SETTLE_S are over."""
        url = self._server.start()
        try:
            self._workers = [self._spawn() for _ in range(self._number)]
            async with connect(url) as redis:
                store = self._store = JobStore(redis, self._settings)
                mischief = asyncio.create_task(self._mischief())
                await self._submit(store)
                await self._struck.wait()  # a short run on a fast machine
                mischief.cancel()
                with suppress(asyncio.CancelledError):
                    await mischief
                await self._settled(store)
                await asyncio.gather(*self._watchers)
                await self._count(store)
        finally:
            for worker in self._workers:
                worker.kill()
                worker.wait()
            self._server.stop()
        return self.report

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.chaos.worker", self._server.url]
        return subprocess.Popen(
            [*command, self._settings.model_dump_json()],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    async def _submit(self, store: JobStore) -> None:
        """Each request until it is accepted, under one Idempotency-Key, as a careful client does."""
        for number in range(self._jobs):
            idempotency_key = IdempotencyKey(f"request {number}", "the same body")
            while True:
                try:
                    job = await store.accept(
                        NewJob(
                            new_job_id(),
                            f"owner {number % 5}",
                            resolved(f"request {number}"),
                            (),
                            SubmitOptions(idempotency_key=idempotency_key),
                        )
                    )
                    break
                except Overloaded:
                    self.report.refused += 1
                    await asyncio.sleep(0.05)
            self._ids.append(job.id)
            await asyncio.sleep(self._random.uniform(0.0, 0.1))
        self.report.accepted = len(self._ids)

    async def _mischief(self) -> None:
        acts = [self._kill_worker, self._kill_worker, self._zombie, self._kill_store, self._hang_store]
        while True:
            await asyncio.sleep(self._random.uniform(0.2, 1.0))
            self._struck.set()
            await self._random.choice(acts)()

    async def _held(self) -> dict[str, int]:
        """Attempts by job id, of all that run now; none while the store is unreachable."""
        with suppress(WeftError, RedisError):
            ids = await self._store.redis.zrange(Keys(self._settings.redis_prefix).running, 0, -1)
            return {job_id: (await self._store.get(job_id)).attempt for job_id in ids}
        return {}

    def _watch(self, struck: str, held: dict[str, int] | None = None) -> None:
        watcher = asyncio.create_task(self._recovered(struck, held or {}))
        self._watchers.add(watcher)

    async def _recovered(self, struck: str, held: dict[str, int]) -> None:
        """Record the seconds until the store answers and these attempts have ended or were replaced."""
        began = time.monotonic()
        while time.monotonic() < began + SETTLE_S:
            try:
                await self._store.ping()
                for job_id, attempt in list(held.items()):
                    job = await self._store.get(job_id)
                    if job.state is not JobState.processing or job.attempt > attempt:
                        del held[job_id]
                if not held:
                    break
            except WeftError:
                pass
            await asyncio.sleep(0.02)
        self.report.recovery_s.setdefault(struck, []).append(time.monotonic() - began)

    async def _kill_worker(self) -> None:
        number = self._random.randrange(len(self._workers))
        held = await self._held()
        self._workers[number].kill()
        self._watch("worker", held)
        self._workers[number].wait()
        self._workers[number] = self._spawn()
        self.report.kills["worker"] += 1

    async def _zombie(self) -> None:
        """Stopped past its lease, then continued."""
        self.report.kills["zombie"] += 1
        worker = self._random.choice(self._workers)
        held = await self._held()
        worker.send_signal(signal.SIGSTOP)
        self._watch("zombie", held)
        try:
            await asyncio.sleep(ZOMBIE_S)
        finally:
            worker.send_signal(signal.SIGCONT)

    async def _kill_store(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._server.pid, signal.SIGKILL)
            self.report.kills["store"] += 1
            self._watch("store")

    async def _hang_store(self) -> None:
        pid = self._server.pid
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            self.report.kills["hang"] += 1
            self._watch("hang")
            try:
                await asyncio.sleep(self._hang_s)
            finally:
                os.kill(pid, signal.SIGCONT)

    async def _settled(self, store: JobStore) -> None:
        deadline = time.monotonic() + SETTLE_S
        waiting = set(self._ids)
        while waiting and time.monotonic() < deadline:
            for job_id in sorted(waiting):
                with suppress(WeftError):
                    if (await store.get(job_id)).state.ended:
                        waiting.discard(job_id)
            await asyncio.sleep(0.1)

    async def _count(self, store: JobStore) -> None:
        report, results = self.report, ResultStore(self._settings.results_root)
        report.double += len(self._ids) - len(set(self._ids))
        for job_id in self._ids:
            try:
                job = await store.get(job_id)
            except WeftError:
                report.lost += 1
                continue
            report.states[job.state] = report.states.get(job.state, 0) + 1
            published = [event for _, event in await store.events(job_id)]
            endings = sum(isinstance(event, events.ENDINGS) for event in published)
            report.lost += not job.state.ended
            report.double += endings > 1
            if job.state is JobState.completed:
                report.unreadable += not await is_readable(results, job.artifacts)


async def is_readable(results: ResultStore, artifacts: tuple[object, ...]) -> bool:
    """Whether every file of a job is there with the bytes that were written; False without files."""
    try:
        for artifact in artifacts:
            await results.get(artifact.path, sha256=artifact.sha256)  # type: ignore[attr-defined]
    except WeftError:
        return False
    return bool(artifacts)
