"""Attempts that go wrong: models that are silent, stop or hang, storage and a store that fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest

from deployments.protocol import events
from deployments.protocol.errors import Overloaded
from deployments.protocol.request import ResolvedRequest
from serve_app.jobs import events as job_events
from serve_app.jobs.job import Job, JobState
from serve_app.jobs.service import JobService
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker import attempt as attempt_module
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore, StoredFile
from tests.patience import slowness
from tests.serving.fakes import OWNER, FakeModels, eventually, picture
from tests.serving.jobs.conftest import running
from tests.serving.jobs.test_dispatch import before_the_last_step, ended, submitted

Story = Callable[[ResolvedRequest], AsyncGenerator[events.Event]]
Run = Callable[[Story], Awaitable[tuple[Job, "ScriptedModels"]]]


class ScriptedModels(FakeModels):
    """Models whose calls yield what `story` yields."""

    def __init__(self, story: Story) -> None:
        super().__init__()
        self.story = story

    async def generate(
        self, model_id: str, request: ResolvedRequest, /, *, user: str = "", resume: bytes | None = None
    ) -> AsyncGenerator[events.Event]:
        self.requests.append(request)
        async for event in self.story(request):
            yield event


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_module, "RETRY_FIRST_S", 0.001)


@pytest.fixture
def run_to_the_end(store: JobStore, results: ResultStore, settings: Settings, quick_retries: None) -> Run:
    async def run(story: Story) -> tuple[Job, ScriptedModels]:
        models = ScriptedModels(story)
        async with running(Dispatcher(store, results, models, settings)):
            return await ended(store, await submitted(store)), models

    return run


async def test_previews_and_stages_reach_the_followers(store: JobStore, run_to_the_end: Run) -> None:
    preview = events.Preview(1, "image/jpeg", b"rough")
    stages = [events.Stage("decode", 1, 2), events.Stage("encode", 2, 2)]

    async def story(request: ResolvedRequest) -> AsyncGenerator[events.Event]:
        yield events.Started(1)
        yield preview
        yield events.Step(1, 1)
        for stage in stages:
            yield stage
        yield events.Artifact(0, "image", "image/png", picture(), 64, 64, request.seed)
        yield events.Done(0.0, 0.25)

    job, _ = await run_to_the_end(story)

    assert [event for _, event in await store.events(job.id)][2:] == [
        job_events.Step(0, 1),
        preview,
        job_events.Step(1, 1),
        *stages,
        job_events.JobCompleted(0.25),
    ]


async def test_a_model_that_stops_without_an_answer_is_called_again(run_to_the_end: Run) -> None:
    async def story(request: ResolvedRequest) -> AsyncGenerator[events.Event]:
        yield events.Started(4)

    job, models = await run_to_the_end(story)

    assert (job.state, job.attempt, len(models.requests)) == (JobState.failed, 3, 3)
    assert job.error is not None
    assert (job.error.kind, job.error.message) == ("model_unavailable", "the model stopped without an answer")


async def test_a_model_that_never_begins_costs_an_attempt(
    run_to_the_end: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt_module, "START_LIMIT_S", 0.05)

    async def story(request: ResolvedRequest) -> AsyncGenerator[events.Event]:
        yield events.Queued(0)
        await asyncio.Event().wait()

    job, models = await run_to_the_end(story)

    assert (job.state, job.failures, len(models.requests)) == (JobState.failed, 3, 3)
    assert job.error == attempt_module.NEVER_STARTED


async def test_a_model_that_has_begun_may_take_longer_than_the_time_to_begin(
    run_to_the_end: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt_module, "START_LIMIT_S", 0.5 * slowness())
    loop = asyncio.get_running_loop()

    async def story(request: ResolvedRequest) -> AsyncGenerator[events.Event]:
        yield events.Started(1)
        later = loop.create_future()
        loop.call_later(0.6 * slowness(), later.set_result, None)
        await later
        yield events.Done(0.0, 0.25)

    job, _ = await run_to_the_end(story)

    assert (job.state, job.attempt) == (JobState.completed, 1)


async def test_a_call_that_ignores_its_cancellation_is_left_running(
    store: JobStore,
    results: ResultStore,
    settings: Settings,
    service: JobService,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(attempt_module, "STOP_LIMIT_S", 0.02)
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def story(request: ResolvedRequest) -> AsyncGenerator[events.Event]:
        yield events.Started(4)
        begun.set()
        while not may_end.is_set():
            try:
                await may_end.wait()
            except asyncio.CancelledError:
                continue

    async with running(Dispatcher(store, results, ScriptedModels(story), settings)):
        job_id = await submitted(store)
        await eventually(begun.is_set)
        await service.cancel(job_id, OWNER)
        job = await ended(store, job_id)
        may_end.set()

    assert job.state is JobState.cancelled
    assert "a cancelled call did not end in time; it is left running" in caplog.messages


async def test_a_resume_state_that_cannot_be_stored_starts_the_job_from_the_beginning(
    store: JobStore,
    results: ResultStore,
    dispatcher: Dispatcher,
    models: FakeModels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put = results.put

    async def put_no_resume_state(path: str, data: bytes) -> StoredFile:
        if data == b"2":
            raise OSError(28, "No space left on device")
        return await put(path, data)

    monkeypatch.setattr(results, "put", put_no_resume_state)
    models.troubles = [events.Handover(2, b"2")]

    job = await ended(store, await submitted(store))

    assert (job.state, job.attempt, job.failures) == (JobState.completed, 2, 0)
    assert models.resumed == [None, None]


async def test_files_that_cannot_be_removed_do_not_change_the_ending(
    store: JobStore,
    results: ResultStore,
    dispatcher: Dispatcher,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def failing_sweep(job_id: str, keep: object = ()) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(results, "sweep", failing_sweep)

    job = await ended(store, await submitted(store))
    await eventually(lambda: dispatcher.active == 0)

    assert job.state is JobState.completed
    assert "files of a job were not removed" in caplog.messages


async def test_a_commit_that_the_store_refuses_is_tried_again(
    store: JobStore,
    dispatcher: Dispatcher,
    models: FakeModels,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    complete, refusals = store.leases.complete, [Overloaded("the disk is full")]

    async def refusing_complete(*args: object, **named: object) -> Job:
        if refusals:
            raise refusals.pop()
        return await complete(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(store.leases, "complete", refusing_complete)
    models.gate.clear()
    job_id = await submitted(store)
    await before_the_last_step(store, models, job_id)
    models.gate.set()

    job = await ended(store, job_id)

    assert (job.state, job.attempt, len(job.artifacts)) == (JobState.completed, 1, 1)
    assert "the job store refuses a commit: the disk is full" in caplog.messages
