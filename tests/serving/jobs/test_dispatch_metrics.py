"""What a dispatcher counts, and the log context it gives to the model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from deployments.protocol import events, log_context
from deployments.protocol.errors import BadRequest
from deployments.protocol.log_context import LogContext
from serve_app.job_ids import new_job_id
from serve_app.jobs.job import Job, NewJob
from serve_app.jobs.service import JobService
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker import attempt as attempt_module
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.observability.metrics import LocalMeter
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from tests.patience import slowness
from tests.serving.conftest import MakeSettings
from tests.serving.fakes import MODEL, OWNER, FakeModels, eventually, resolved
from tests.serving.jobs.conftest import running

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def counted(meter: LocalMeter, sample: str, **labels: str) -> float:
    return meter.registry.get_sample_value(sample, {"model": MODEL, **labels}) or 0.0


async def submitted(store: JobStore) -> str:
    return (await store.accept(NewJob(new_job_id(), OWNER, resolved("a cat")))).id


async def ended(store: JobStore, job_id: str) -> Job:
    async def has_ended() -> bool:
        return (await store.get(job_id)).state.ended

    await eventually(has_ended)
    return await store.get(job_id)


async def test_ends_waits_and_queues_are_counted_by_model(
    store: JobStore, results: ResultStore, settings: Settings
) -> None:
    meter, models = LocalMeter(), FakeModels()
    async with running(Dispatcher(store, results, models, settings, meter=meter)):
        await ended(store, await submitted(store))
        models.troubles.append(BadRequest("no such thing"))
        await ended(store, await submitted(store))

    assert counted(meter, "weft_jobs_ended_total", state="completed", error="") == 1
    assert counted(meter, "weft_jobs_ended_total", state="failed", error="bad_request") == 1
    assert counted(meter, "weft_job_wait_seconds_count") == 2
    assert counted(meter, "weft_job_total_seconds_count") == 1, "only completed ones"
    assert counted(meter, "weft_slots_free") > 0
    assert meter.registry.get_sample_value("weft_jobs_queued", {"model": MODEL}) is not None


async def test_a_handover_of_a_stopped_replica_counts_as_released(
    store: JobStore, results: ResultStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt_module, "RETRY_FIRST_S", 0.001)
    meter, models = LocalMeter(), FakeModels()
    models.troubles.append(events.Handover(2, b"2"))
    async with running(Dispatcher(store, results, models, settings, meter=meter)):
        await ended(store, await submitted(store))

    assert counted(meter, "weft_attempts_given_back_total") == 1
    assert counted(meter, "weft_jobs_ended_total", state="completed", error="") == 1


async def test_a_lost_lease_is_counted_by_the_dispatcher_that_reaps_it(
    make_settings: MakeSettings, store: JobStore, results: ResultStore
) -> None:
    settings, meter = make_settings(lease_s=0.2 * slowness(), heartbeat_s=0.05), LocalMeter()
    silent = JobStore(store.redis, settings)
    job_id = await submitted(silent)
    assert await silent.leases.claim({MODEL: 1}) is not None

    async with running(Dispatcher(silent, results, FakeModels(), settings, meter=meter)):
        await ended(silent, job_id)

    assert counted(meter, "weft_leases_lost_total") == 1


class Noting(FakeModels):
    """Records the log context of each call."""

    def __init__(self) -> None:
        super().__init__({MODEL: 4})
        self.origins: list[LogContext] = []

    async def generate(self, *arguments: Any, **named: Any) -> AsyncGenerator[events.Event]:
        self.origins.append(log_context.current())
        async for event in super().generate(*arguments, **named):
            yield event


async def test_the_model_is_called_with_the_log_context_of_the_job_and_its_http_request(
    store: JobStore,
    results: ResultStore,
    settings: Settings,
    service: JobService,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = Noting()
    monkeypatch.setattr("serve_app.jobs.submission.current_traceparent", lambda: TRACE)

    async def call(request_id: str) -> str:
        log_context.bind(LogContext(request_id=request_id))
        return (await service.submit(resolved("a cat"), OWNER)).id

    ids = await asyncio.gather(*(asyncio.create_task(call(name)) for name in ("first-1", "second-2")))
    async with running(Dispatcher(store, results, models, settings)):
        for job_id in ids:
            await ended(store, job_id)

    wanted = [LogContext(ids[0], "first-1", TRACE), LogContext(ids[1], "second-2", TRACE)]
    assert sorted(models.origins, key=lambda one: one.request_id) == wanted
    assert log_context.current() == log_context.EMPTY, "nothing of it sticks to others"
