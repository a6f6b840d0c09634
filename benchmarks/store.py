"""Cost of the job store without a model: submit, finish, progress, a queue of 10,000, bytes per job.

Uses the embedded Valkey, which has every write on disk before it answers (appendfsync always).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import ledger
from redis.asyncio import Redis

from deployments.protocol import events
from deployments.protocol.request import ResolvedRequest
from serve_app.job_ids import new_job_id
from serve_app.jobs import events as job_events
from serve_app.jobs import follow
from serve_app.jobs.job import NewJob
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.redis.embedded import EmbeddedRedis
from serve_app.redis.transactions import connect
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore

MODEL = "m"
STEPS, STEP_S = 50, 0.02  # of a job whose progress is followed
FOLLOWED = 8  # of them at once
REQUEST = ResolvedRequest(
    model=MODEL,
    prompt="a red fox in the snow, " * 8,
    width=1024,
    height=1024,
    num_inference_steps=4,
    guidance_scale=0.0,
    seed=7,
    max_sequence_length=256,
)


class Figures:
    """Prints each figure, or records it if `keep`."""

    def __init__(self, keep: bool) -> None:
        self._keep = keep

    def report(self, name: str, values: list[float], unit: str, notes: str = "") -> None:
        ordered = sorted(values)
        p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
        spread = f"p99 {p99:.3g}" if len(values) > 1 else ""
        if self._keep:
            ledger.record(name, statistics.median(values), unit, spread=spread, n=len(values), notes=notes)
        else:
            print(f"{name} = {statistics.median(values):.4g} {unit}  {spread}  (n={len(values)}) {notes}")


async def accept(store: JobStore, owner: str = "ada") -> str:
    return (await store.accept(NewJob(new_job_id(), owner, REQUEST))).id


async def submits(store: JobStore, figures: Figures, jobs: int) -> None:
    took_ms = []
    for _ in range(jobs):
        began = time.perf_counter()
        await accept(store)
        took_ms.append(1e3 * (time.perf_counter() - began))
    figures.report("store_submit_ms", took_ms, "ms", "one caller; durable when it returns")


async def finishes(store: JobStore, figures: Figures, jobs: int) -> None:
    """Claim, one heartbeat and the end of each waiting job, eight at a time."""

    async def worker() -> None:
        while (claim := await store.leases.claim({MODEL: 1})) is not None:
            await store.leases.heartbeat(claim, step=1, steps=4)
            await store.leases.complete(claim, [], 1.0)

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(8)))
    figures.report(
        "store_claim_to_end_jobs_per_s", [jobs / (time.perf_counter() - began)], "jobs/s", "8 workers"
    )


async def both(store: JobStore, figures: Figures, jobs: int) -> None:
    began = time.perf_counter()
    for first in range(0, jobs, 8):
        await asyncio.gather(*(accept(store, f"owner {first + i}") for i in range(8)))
        await asyncio.gather(*(one(store) for _ in range(8)))
    figures.report(
        "store_submit_to_end_jobs_per_s",
        [jobs / (time.perf_counter() - began)],
        "jobs/s",
        "no model, 8 at a time",
    )


async def one(store: JobStore) -> None:
    claim = await store.leases.claim({MODEL: 1})
    if claim is not None:
        await store.leases.complete(claim, [], 1.0)


async def long_queue(store: JobStore, redis: Redis, figures: Figures, jobs: int) -> None:
    before = (await redis.info("memory"))["used_memory"]
    ids = []
    for number in range(jobs):
        ids.append(await accept(store, f"owner {number % 100}"))
    after = (await redis.info("memory"))["used_memory"]
    queue = f"{jobs} jobs waiting"
    figures.report(
        "store_bytes_per_waiting_job",
        [(after - before) / jobs],
        "bytes",
        f"{queue}, prompt of 184 characters",
    )
    took_ms = []
    for job_id in ids[:: max(1, jobs // 200)]:
        job = await store.get(job_id)
        began = time.perf_counter()
        await store.position(job)
        took_ms.append(1e3 * (time.perf_counter() - began))
    figures.report("store_position_ms", took_ms, "ms", queue)
    took_ms = []
    for _ in range(min(200, jobs)):
        began = time.perf_counter()
        claim = await store.leases.claim({MODEL: 1})
        assert claim is not None
        took_ms.append(1e3 * (time.perf_counter() - began))
    figures.report("store_claim_ms", took_ms, "ms", queue)


class SteppingModel:
    """A model that prints the time of each step, by the machine's clock that all processes share."""

    def __init__(self) -> None:
        self._free = FOLLOWED

    def free_slots(self) -> dict[str, int]:
        return {MODEL: self._free}

    async def generate(
        self, model_id: str, request: ResolvedRequest, /, *, user: str = "", resume: bytes | None = None
    ) -> AsyncGenerator[events.Event]:
        self._free -= 1
        try:
            yield events.Started(STEPS)
            for step in range(1, STEPS + 1):
                await asyncio.sleep(STEP_S)
                print(request.seed, step, time.monotonic(), flush=True)
                yield events.Step(step, STEPS)
            yield events.Done(0.0, STEPS * STEP_S)
        finally:
            self._free += 1


async def work(url: str, settings_json: str) -> None:
    """Run a dispatcher with SteppingModelModel until the process is terminated."""
    settings = Settings.model_validate_json(settings_json)
    store = JobStore(connect(url), settings)
    await Dispatcher(store, ResultStore(settings.results_root), SteppingModel(), settings).run()


async def progress_lag(url: str, settings: Settings, store: JobStore, figures: Figures, jobs: int) -> None:
    """Measure milliseconds from a step in a dispatcher's process to a follower here, through Valkey."""
    command = [sys.executable, __file__, "--work", url, settings.model_dump_json()]
    worker = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert worker.stdout is not None
    wakeups, seen = store.event_wakeups(), dict[tuple[int, int], float]()

    async def watch(seed: int) -> None:
        request = REQUEST.model_copy(update={"seed": seed})
        job = await store.accept(NewJob(new_job_id(), f"owner {seed}", request))
        async for _, event in follow.follow(store, wakeups, job.id):
            if isinstance(event, job_events.Step) and event.step:
                seen.setdefault((seed, event.step), time.monotonic())

    async def read(stream: asyncio.StreamReader) -> dict[tuple[int, int], float]:
        taken = {}
        async for line in stream:
            seed, step, at = line.split()
            taken[int(seed), int(step)] = float(at)
        return taken

    reading = asyncio.create_task(read(worker.stdout))
    for first in range(0, jobs, FOLLOWED):
        await asyncio.gather(*(watch(first + number) for number in range(FOLLOWED)))
    worker.terminate()
    taken = await reading
    await worker.wait()
    await wakeups.aclose()
    lags_ms = sorted(1e3 * (seen[key] - at) for key, at in taken.items())
    notes = f"{FOLLOWED} jobs at once, a step every {1e3 * STEP_S:.0f} ms each; two processes"
    figures.report("progress_lag_ms", lags_ms, "ms", notes)
    figures.report("progress_lag_p99_ms", [lags_ms[int(0.99 * len(lags_ms))]], "ms", notes)


async def measure(url: str, folder: Path, figures: Figures, options: argparse.Namespace) -> None:
    async with connect(url) as redis:
        numbers = iter(range(100))

        def settings() -> Settings:
            return Settings(
                _env_file=None,
                data_dir=folder,
                redis_prefix=f"weft:bench{next(numbers)}:",
                max_pending=10**6,
                max_active_per_owner=10**6,
            )

        def fresh() -> JobStore:
            return JobStore(redis, settings())

        ours = settings()
        await progress_lag(url, ours, JobStore(redis, ours), figures, options.followed)
        store = fresh()
        await submits(store, figures, options.jobs)
        await finishes(store, figures, options.jobs)
        await both(fresh(), figures, options.jobs)
        await long_queue(fresh(), redis, figures, options.queue)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--queue", type=int, default=10_000)
    parser.add_argument("--followed", type=int, default=80, help="jobs whose progress is followed")
    parser.add_argument("--keep", action="store_true", help="record the figures")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        asyncio.run(work(*options.work))
        return
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder)) as url:
        asyncio.run(measure(url, Path(folder), Figures(options.keep), options))


if __name__ == "__main__":
    main()
