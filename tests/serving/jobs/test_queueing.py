"""Queueing in the store: a newcomer passes long queues of others, and estimates follow what was reported."""

from __future__ import annotations

import pytest

from deployments.protocol.errors import Overloaded
from serve_app.job_ids import new_job_id
from serve_app.jobs.job import JobError, NewJob, SubmitOptions
from serve_app.jobs.store.key_names import Keys
from serve_app.jobs.store.start_estimate import Capacity
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.settings import Settings
from tests.serving.fakes import MODEL, eventually, resolved
from tests.serving.jobs.test_dispatch import ended, submitted


async def test_the_store_serves_a_newcomer_before_the_rest_of_a_long_queue(store: JobStore) -> None:
    for _ in range(20):
        await store.accept(NewJob(new_job_id(), "heavy", resolved()))
    first = await store.leases.claim({MODEL: 1})
    newcomer = await store.accept(NewJob(new_job_id(), "light", resolved()))

    position = await store.position(newcomer)
    owners = [claim.job.owner for _ in range(3) if (claim := await store.leases.claim({MODEL: 1}))]

    assert first is not None
    assert position in (1, 2)
    assert "light" in owners[:2]


async def test_a_released_job_keeps_its_queue_score(store: JobStore) -> None:
    ids = [(await store.accept(NewJob(new_job_id(), "heavy", resolved()))).id for _ in range(4)]
    claim = await store.leases.claim({MODEL: 1})
    assert claim is not None

    await store.leases.requeue(claim, JobError("model_unavailable", "lost"))

    again = await store.leases.claim({MODEL: 1})
    assert again is not None
    assert again.job.id == ids[0]


async def test_a_model_whose_queue_is_too_long_rejects_jobs_and_says_when_to_retry(
    store: JobStore, settings: Settings
) -> None:
    await store.throughput.report("a dispatcher", {MODEL: Capacity(4, 0)})
    await store.redis.lpush(Keys(settings.redis_prefix).durations(MODEL), "60.0")
    waiting = await store.accept(NewJob(new_job_id(), "heavy", resolved()))

    estimate = await store.throughput.starts_in_s(waiting.request.model, 1)
    with pytest.raises(Overloaded, match="would wait about") as refusal:
        await store.accept(NewJob(new_job_id(), "light", resolved(), options=SubmitOptions(max_wait_s=1.0)))
    patient = await store.accept(
        NewJob(new_job_id(), "light", resolved(), options=SubmitOptions(max_wait_s=600.0))
    )

    assert estimate == 15.0
    assert refusal.value.retry_after_s == pytest.approx(29.0)
    assert await store.position(patient) == 2


async def test_a_dispatcher_reports_its_capacity_and_how_long_jobs_took(
    store: JobStore, dispatcher: Dispatcher
) -> None:
    job = await ended(store, await submitted(store))

    async def is_reported() -> bool:
        return await store.throughput.starts_in_s(job.request.model, 1) == 0.0

    await eventually(is_reported)
