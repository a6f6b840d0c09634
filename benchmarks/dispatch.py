"""Jobs a second from submit to finish with a null model, by the number of dispatchers on one Valkey.

Every dispatcher and every submitter is a process of its own; the embedded Valkey has every write on disk
before it answers (appendfsync always). The model answers at once and makes no files, so the figure is the
cost of accepting, claiming, reporting progress and committing.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from multiprocessing.synchronize import Event
from pathlib import Path

import ledger

from deployments.protocol import events
from deployments.protocol.request import ResolvedRequest
from serve_app.job_ids import new_job_id
from serve_app.jobs.job import NewJob
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.redis.embedded import EmbeddedRedis
from serve_app.redis.transactions import connect
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore

MODEL = "null"
CALLERS = 16  # per submitter; each waits for its answer before the next call
REQUEST = ResolvedRequest(
    model=MODEL,
    prompt="a red fox in the snow",
    width=1024,
    height=1024,
    num_inference_steps=4,
    guidance_scale=0.0,
    seed=7,
    max_sequence_length=256,
)


class NullModel:
    """Answers at once; takes `slots` requests of this dispatcher at a time."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._active: Counter[str] = Counter()

    def free_slots(self) -> Mapping[str, int]:
        return {MODEL: self._slots - self._active[MODEL]}

    async def generate(
        self, model: str, request: ResolvedRequest, /, **_: object
    ) -> AsyncGenerator[events.Event]:
        self._active[model] += 1
        try:
            yield events.Started(request.num_inference_steps)
            yield events.Done(0.0, 0.0)
        finally:
            self._active[model] -= 1


def settings(url: str, prefix: str, folder: str) -> Settings:
    return Settings.load(
        redis_url=url, redis_prefix=prefix, data_dir=folder, max_pending=10**6, max_active_per_owner=10**6
    )


def dispatch(given: Settings, slots: int, stop: Event) -> None:
    """One dispatcher's process, until `stop`."""

    async def serve() -> None:
        assert given.redis_url is not None
        async with connect(given.redis_url.get_secret_value()) as redis:
            results = ResultStore(given.results_root, 0)
            dispatcher = Dispatcher(JobStore(redis, given), results, NullModel(slots), given)
            work = asyncio.create_task(dispatcher.run())
            await asyncio.to_thread(stop.wait)
            await dispatcher.drain()
            await work

    asyncio.run(serve())


def submit(given: Settings, jobs: int, go: Event, submitter: int) -> None:
    """One submitter's process: submits `jobs` jobs, one owner per caller."""

    async def caller(store: JobStore, number: int) -> None:
        for _ in range(number, jobs, CALLERS):
            await store.accept(NewJob(new_job_id(), f"owner {submitter}-{number}", REQUEST))

    async def serve() -> None:
        assert given.redis_url is not None
        async with connect(given.redis_url.get_secret_value()) as redis:
            store = JobStore(redis, given)
            await asyncio.to_thread(go.wait)
            await asyncio.gather(*(caller(store, number) for number in range(CALLERS)))

    asyncio.run(serve())


async def ended(given: Settings, jobs: int) -> tuple[float, float]:
    """Jobs a second, first submit to last finish by the store's clock, and the median seconds of one job."""
    assert given.redis_url is not None
    async with connect(given.redis_url.get_secret_value()) as redis:
        store = JobStore(redis, given)
        done = []
        deadline = time.monotonic() + 600.0
        while len(done) < jobs:
            assert time.monotonic() < deadline, f"{len(done)} of {jobs} jobs ended within 10 minutes"
            await asyncio.sleep(0.25)
            ids = [
                key.rsplit(":", 1)[-1]
                async for key in redis.scan_iter(f"{given.redis_prefix}job:*", count=5000)
            ]
            ids = [each for each in ids if len(each) == 32]
            if len(ids) < jobs or sum((await store.throughput.queued([MODEL])).values()):
                continue
            done = [job for each in ids if (job := await store.get(each)).state.ended]
        assert {str(job.state) for job in done} == {"completed"}
        assert {job.attempt for job in done} == {1}, "a job was run twice"
    last = max(job.completed_at or 0.0 for job in done)
    first = min(job.created_at for job in done)
    return jobs / (last - first), statistics.median(
        (job.completed_at or 0.0) - job.created_at for job in done
    )


def measure(url: str, folder: str, dispatchers: int, options: argparse.Namespace) -> tuple[float, float]:
    given = settings(url, f"weft:dispatch{dispatchers}-{time.monotonic_ns()}:", folder)
    spawn = multiprocessing.get_context("spawn")
    go, stop = spawn.Event(), spawn.Event()
    share = options.jobs // options.submitters
    slots = options.slots // dispatchers
    children = [spawn.Process(target=dispatch, args=(given, slots, stop)) for _ in range(dispatchers)]
    children += [
        spawn.Process(target=submit, args=(given, share, go, number)) for number in range(options.submitters)
    ]
    for child in children:
        child.start()
    time.sleep(options.settle)  # imports and connections are not measured
    go.set()
    try:
        return asyncio.run(ended(given, share * options.submitters))
    finally:
        stop.set()
        for child in children:
            child.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=4000)
    parser.add_argument("--dispatchers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--submitters", type=int, default=2, help="processes")
    parser.add_argument("--slots", type=int, default=64, help="of the model, shared by the dispatchers")
    parser.add_argument("--settle", type=float, default=5.0, help="seconds for the processes to start")
    parser.add_argument("--keep", action="store_true", help="record the figures")
    options = parser.parse_args()
    for dispatchers in options.dispatchers:
        with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder)) as url:
            rate, latency_s = measure(url, folder, dispatchers, options)
        name = f"dispatch_jobs_per_s_{dispatchers}"
        notes = (
            f"{dispatchers} dispatchers and {options.submitters} submitters of {CALLERS} callers, null "
            f"model with {options.slots} slots, one Valkey on the same {os.cpu_count()} cores"
        )
        if options.keep:
            spread = f"a job took {latency_s:.3g} s at the median"
            ledger.record(name, rate, "jobs/s", spread=spread, n=options.jobs, notes=notes)
        else:
            print(f"{name}: {rate:.4g} jobs/s, a job took {latency_s:.3g} s at the median; {notes}")


if __name__ == "__main__":
    main()
