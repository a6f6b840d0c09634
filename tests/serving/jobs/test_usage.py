"""What jobs used is counted once, with their ending, whatever ended them and whatever was lost before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from datetime import date, timedelta

import pytest
from redis.asyncio import Redis

from deployments.protocol import events
from deployments.protocol.errors import BadRequest, QuotaExceeded
from deployments.protocol.request import GenerationRequest
from serve_app.job_ids import new_job_id
from serve_app.jobs.job import Job, JobError, JobState, NewJob, SubmitOptions
from serve_app.jobs.service import JobService
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.usage import AMOUNTS, Amounts, UsageRow, amounts_of, grouped
from serve_app.jobs.worker import attempt as attempt_module
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.observability.metrics import LocalMeter
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from tests.serving.fakes import (
    CARD,
    MODEL,
    OWNER,
    FakeModels,
    eventually,
    keys_without_ttl,
    picture,
    resolved,
)
from tests.serving.jobs.conftest import running
from tests.serving.jobs.test_dispatch import ended

PRICE = 0.002  # of a device second


class CountingModels(FakeModels):
    """Every step takes 0.5 device seconds, and the end another one; `lost` attempts end after two steps."""

    def __init__(self, lost: int = 0, *, stops: bool = False) -> None:
        super().__init__()
        self.lost = lost
        self.stops = stops  # lost attempts hand their state over
        self.holds_at: int | None = None  # the step after which nothing comes

    async def generate(
        self, model_id: str, request: object, /, *, user: str = "", resume: bytes | None = None
    ) -> AsyncGenerator[events.Event]:
        first = 0 if resume is None else int(resume)
        yield events.Started(self.steps)
        for step in range(first + 1, self.steps + 1):
            yield events.Step(step, self.steps, 0.5 * (step - first))
            if step == self.holds_at:
                await asyncio.Event().wait()
            if self.lost and step - first == 2:
                self.lost -= 1
                if self.stops:
                    yield events.Handover(step, str(step).encode())
                lost = events.Failed("model_unavailable", "it is gone", retryable=True)
                yield replace(lost, device_s=1.25)
                return
        for kind in ("image", "thumbnail"):
            yield events.Artifact(0, kind, "image/png", picture(), 64, 64, 7)
        yield events.Done(0.0, 0.5, device_s=0.5 * (self.steps - first) + 1.0)


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_module, "RETRY_FIRST_S", 0.001)


async def submitted(
    store: JobStore,
    owner: str = OWNER,
    key: str = "wk_1",
    price: float = PRICE,
    cache_key: str | None = None,
) -> str:
    options = SubmitOptions(api_key=key, price_per_device_second=price, cache_key=cache_key)
    return (await store.accept(NewJob(new_job_id(), owner, resolved(), (), options))).id


async def rows_of_today(store: JobStore, user: str | None = None) -> list[UsageRow]:
    today = await store.usage.today()
    return await store.usage.rows(today, today, user)


async def total(store: JobStore) -> Amounts:
    return grouped(await rows_of_today(store), [])[0].amounts


async def test_a_finished_job_counts_its_device_seconds_its_files_and_its_cost(
    store: JobStore, results: ResultStore, settings: Settings
) -> None:
    meter = LocalMeter()
    async with running(Dispatcher(store, results, CountingModels(), settings, meter=meter)):
        job = await ended(store, await submitted(store))

    exported = [
        meter.registry.get_sample_value(f"weft_job_{name}_total", {"model": MODEL})
        for name in ("device_seconds", "megapixels", "cost")
    ]
    assert exported == [3.0, 64 * 64 / 1e6, 0.006]
    size = sum(artifact.size_bytes for artifact in job.artifacts)
    used = Amounts(1, 1, 0, 64 * 64, size, 3_000_000, 6_000)
    assert amounts_of(job) == used
    [row] = await rows_of_today(store)
    assert row == UsageRow((await store.usage.today()).isoformat(), OWNER, "wk_1", MODEL, used)


@pytest.mark.parametrize(("stops", "seconds"), [(False, 1.25 + 3.0), (True, 1.25 + 2.0)])
async def test_every_attempt_counts(
    store: JobStore, results: ResultStore, settings: Settings, stops: bool, seconds: float
) -> None:
    async with running(Dispatcher(store, results, CountingModels(1, stops=stops), settings)):
        job = await ended(store, await submitted(store))

    assert job.state is JobState.completed
    assert (await total(store)).device_us == job.device_us == round(seconds * 1e6)


async def test_a_cancelled_job_counts_up_to_its_last_step(
    store: JobStore, results: ResultStore, settings: Settings
) -> None:
    models = CountingModels()
    async with running(Dispatcher(store, results, models, settings)):
        models.holds_at = 1
        job_id = await submitted(store)

        async def at_step_one() -> bool:
            return (await store.get(job_id)).step == 1

        await eventually(at_step_one)
        await store.cancel(job_id)
        job = await ended(store, job_id)

    assert job.state is JobState.cancelled
    assert (await total(store)).device_us == job.device_us == 500_000


async def test_the_seconds_of_a_worker_that_died_are_kept(store: JobStore) -> None:
    job_id = await submitted(store)
    claim = await store.leases.claim({MODEL: 1})
    assert claim is not None
    await store.leases.heartbeat(claim, step=2, steps=4, device_us=700_000)
    await store.redis.hset(store._keys.job(job_id), "lease_us", "0")
    await store.redis.zadd(store._keys.running, {job_id: 0})
    await store.leases.reap()

    again = await store.leases.claim({MODEL: 1})
    assert again is not None
    failed = await store.leases.fail(again, JobError("internal", "no"), device_us=100_000)

    assert failed.device_us == (await total(store)).device_us == 800_000


async def test_only_amounts_above_zero_are_added_to_counters(
    store: JobStore, results: ResultStore, settings: Settings
) -> None:
    class OfRay(LocalMeter):
        def add(self, name: str, value: float = 1.0, **labels: str) -> None:
            assert value > 0, "Ray's counters refuse it"
            super().add(name, value, **labels)

    meter = OfRay()
    async with running(Dispatcher(store, results, CountingModels(), settings, meter=meter)):
        await ended(store, await submitted(store, price=0.0))

    assert meter.registry.get_sample_value("weft_job_total_seconds_count", {"model": MODEL}) == 1


async def test_an_answer_lost_on_its_way_counts_nothing_twice(store: JobStore) -> None:
    await submitted(store)
    claim = await store.leases.claim({MODEL: 1})
    assert claim is not None

    for _ in range(2):
        await store.leases.complete(claim, [], 1.0, device_us=1_000_000)

    assert await total(store) == Amounts(jobs=1, device_us=1_000_000, cost_micros=2_000)


async def test_totals_are_the_sums_of_all_jobs_by_any_group(store: JobStore) -> None:
    jobs: list[Job] = []
    for number in range(12):
        await submitted(store, f"user {number % 3}", f"wk_{number % 2}", PRICE if number % 4 else 0.0)
        claim = await store.leases.claim({MODEL: 1})
        assert claim is not None
        jobs.append(await store.leases.complete(claim, [], 1.0, device_us=1_000 * number + 1))

    rows = await rows_of_today(store)
    everything = sum((amounts_of(job) for job in jobs), Amounts())

    assert len(rows) == 6
    for by in (["user"], ["key"], ["model"], ["day"], ["user", "key"], []):
        groups = grouped(rows, by)  # type: ignore[arg-type]
        assert sum((row.amounts for row in groups), Amounts()) == everything
    assert [row.user for row in grouped(rows, ["user"])] == ["user 0", "user 1", "user 2"]
    assert {row.user for row in await rows_of_today(store, "user 1")} == {"user 1"}


async def test_a_copied_result_uses_no_device(
    store: JobStore, results: ResultStore, settings: Settings
) -> None:
    async with running(Dispatcher(store, results, CountingModels(), settings)):
        first = await ended(store, await submitted(store, cache_key="same"))
        second = await ended(store, await submitted(store, cache_key="same"))

    assert second.cached
    assert (first.device_us, second.device_us) == (3_000_000, 0)
    assert (await total(store)).images == 2


async def test_a_spent_budget_refuses_the_next_job_and_no_other_user(
    store: JobStore, results: ResultStore, settings: Settings
) -> None:
    card = CARD.model_copy(update={"price_per_device_second": PRICE})
    service = JobService(store, results, {CARD.id: card}, settings)
    async with running(Dispatcher(store, results, CountingModels(), settings)):
        request = GenerationRequest(model=MODEL, prompt="a cat")
        for _ in range(2):
            job = await service.submit(request, OWNER, budget_per_month=0.011)
            await ended(store, job.id)

        with pytest.raises(QuotaExceeded, match=r"have cost 0\.01, and your budget is 0\.011"):
            await service.submit(request, OWNER, budget_per_month=0.011)
        other = await service.submit(request, "bob", budget_per_month=0.011)
        await ended(store, other.id)
    await service.aclose()


async def test_reports_are_of_a_sensible_period(service: JobService, store: JobStore) -> None:
    today = await store.usage.today()

    with pytest.raises(BadRequest, match="at most 366 days"):
        await service.usage(today - timedelta(400), None, None)
    with pytest.raises(BadRequest, match="`from` must be before `to`"):
        await service.usage(date(2026, 2, 2), date(2026, 2, 1), None)
    assert await service.usage(None, None, None) == []


async def test_totals_do_not_stay_for_ever(store: JobStore, redis: Redis, settings: Settings) -> None:
    await submitted(store)
    claim = await store.leases.claim({MODEL: 1})
    assert claim is not None
    await store.leases.complete(claim, [], 1.0, device_us=1_000_000)

    kept = [
        key for key in await keys_without_ttl(redis, settings.redis_prefix) if "usage" in key or "cost" in key
    ]
    assert kept == []


def test_amounts_are_added_field_by_field() -> None:
    one = Amounts(**{name: number for number, name in enumerate(AMOUNTS, 1)})

    assert one + one == Amounts(**{name: 2 * number for number, name in enumerate(AMOUNTS, 1)})
