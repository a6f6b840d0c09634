"""What the job store costs without a model: submit, finish, a queue of 10,000, and bytes per job.

On the embedded Valkey, which has every write on disk before it answers (appendfsync always).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import ledger
from redis.asyncio import Redis

from deployments.protocol.request import FittedRequest
from serve_app.embedded_redis import EmbeddedRedis
from serve_app.jobs.job import new_job_id
from serve_app.jobs.store import JobStore
from serve_app.settings import Settings
from serve_app.transaction import connect

MODEL = "m"
REQUEST = FittedRequest(
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
    """Printed as they come; recorded when they shall be kept."""

    def __init__(self, keep: bool) -> None:
        self._keep = keep

    def tell(self, name: str, values: list[float], unit: str, notes: str = "") -> None:
        ordered = sorted(values)
        p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
        spread = f"p99 {p99:.3g}" if len(values) > 1 else ""
        if self._keep:
            ledger.record(
                f"store: {name}", statistics.median(values), unit, spread=spread, n=len(values), notes=notes
            )
        else:
            print(f"{name}: {statistics.median(values):.4g} {unit}  {spread}  (n={len(values)}) {notes}")


async def accept(store: JobStore, owner: str = "ada") -> str:
    return (await store.accept(new_job_id(), owner, REQUEST)).id


async def submits(store: JobStore, figures: Figures, jobs: int) -> None:
    took_ms = []
    for _ in range(jobs):
        began = time.perf_counter()
        await accept(store)
        took_ms.append(1e3 * (time.perf_counter() - began))
    figures.tell("submit, one after another", took_ms, "ms", "one caller; durable when it returns")


async def finishes(store: JobStore, figures: Figures, jobs: int) -> None:
    """Claim, one heartbeat and the end of each waiting job, eight at a time."""

    async def worker() -> None:
        while (claim := await store.claim({MODEL: 1})) is not None:
            await store.heartbeat(claim, step=1, steps=4)
            await store.complete(claim, [], 1.0)

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(8)))
    figures.tell("jobs a second, claim to end", [jobs / (time.perf_counter() - began)], "jobs/s", "8 workers")


async def both(store: JobStore, figures: Figures, jobs: int) -> None:
    began = time.perf_counter()
    for first in range(0, jobs, 8):
        await asyncio.gather(*(accept(store, f"owner {first + i}") for i in range(8)))
        await asyncio.gather(*(one(store) for _ in range(8)))
    figures.tell(
        "jobs per second, submit and end",
        [jobs / (time.perf_counter() - began)],
        "jobs/s",
        "no model, 8 at a time",
    )


async def one(store: JobStore) -> None:
    claim = await store.claim({MODEL: 1})
    if claim is not None:
        await store.complete(claim, [], 1.0)


async def long_queue(store: JobStore, redis: Redis, figures: Figures, jobs: int) -> None:
    before = (await redis.info("memory"))["used_memory"]
    ids = []
    for number in range(jobs):
        ids.append(await accept(store, f"owner {number % 100}"))
    after = (await redis.info("memory"))["used_memory"]
    queue = f"{jobs} jobs waiting"
    figures.tell(
        "memory per waiting job", [(after - before) / jobs], "bytes", f"{queue}, prompt of 184 characters"
    )
    took_ms = []
    for job_id in ids[:: max(1, jobs // 200)]:
        job = await store.get(job_id)
        began = time.perf_counter()
        await store.position(job)
        took_ms.append(1e3 * (time.perf_counter() - began))
    figures.tell("position", took_ms, "ms", queue)
    took_ms = []
    for _ in range(min(200, jobs)):
        began = time.perf_counter()
        claim = await store.claim({MODEL: 1})
        assert claim is not None
        took_ms.append(1e3 * (time.perf_counter() - began))
    figures.tell("claim", took_ms, "ms", queue)


async def measure(url: str, figures: Figures, options: argparse.Namespace) -> None:
    async with connect(url) as redis:
        numbers = iter(range(100))

        def fresh() -> JobStore:
            return JobStore(
                redis,
                Settings(
                    _env_file=None,
                    redis_prefix=f"weft:bench{next(numbers)}:",
                    max_pending=10**6,
                    max_active_per_owner=10**6,
                ),
            )

        store = fresh()
        await submits(store, figures, options.jobs)
        await finishes(store, figures, options.jobs)
        await both(fresh(), figures, options.jobs)
        await long_queue(fresh(), redis, figures, options.queue)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--queue", type=int, default=10_000)
    parser.add_argument("--keep", action="store_true", help="record the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder)) as url:
        asyncio.run(measure(url, Figures(options.keep), options))


if __name__ == "__main__":
    main()
