"""What the dispatchers report of each model's queue, added up for estimates and autoscaling."""

from __future__ import annotations

from redis.asyncio import Redis

from serve_app.job_ids import new_job_id
from serve_app.jobs.job import NewJob
from serve_app.jobs.store.key_names import Keys
from serve_app.jobs.store.start_estimate import CAPACITY_TTL_S, Capacity, Demand
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.store.throughput import DURATIONS_KEPT, DURATIONS_TTL_S
from serve_app.settings import Settings
from tests.serving.fakes import MODEL, OWNER, resolved


async def test_demand_is_what_waits_and_what_all_dispatchers_run(store: JobStore) -> None:
    for model in ("a", "a", "a", "b"):
        await store.accept(NewJob(new_job_id(), OWNER, resolved(model=model)))
    await store.throughput.report("first", {"a": Capacity(4, 1), "b": Capacity(2, 2)})
    await store.throughput.report("second", {"a": Capacity(2, 0)})

    demand = await store.throughput.demand(["b", "a", "unknown"])

    assert demand == {"b": Demand(1, 0), "a": Demand(3, 5), "unknown": Demand(0, 0)}


async def test_a_dispatcher_that_reports_no_more_is_forgotten(
    store: JobStore, redis: Redis, settings: Settings
) -> None:
    await store.throughput.report("first", {MODEL: Capacity(4, 1)})
    key = Keys(settings.redis_prefix).capacity(MODEL)
    seconds = int((await redis.hget(key, "first") or "").split()[2])
    await redis.hset(key, "dead", f"8 0 {seconds - CAPACITY_TTL_S - 1}")

    assert await store.throughput.demand([MODEL]) == {MODEL: Demand(0, 3)}
    assert (await store.throughput.read(redis, MODEL)).capacity == Capacity(4, 1)
    assert 0 < await redis.ttl(key) <= CAPACITY_TTL_S


async def test_the_latest_durations_are_read_newest_first(
    store: JobStore, redis: Redis, settings: Settings
) -> None:
    key = Keys(settings.redis_prefix).durations(MODEL)
    for number in range(DURATIONS_KEPT + 2):
        async with redis.pipeline() as pipe:
            store.throughput.record_duration(pipe, MODEL, float(number))
            await pipe.execute()

    recent = (await store.throughput.read(redis, MODEL)).recent_s

    assert recent == tuple(float(number) for number in reversed(range(2, DURATIONS_KEPT + 2)))
    assert 0 < await redis.ttl(key) <= DURATIONS_TTL_S
