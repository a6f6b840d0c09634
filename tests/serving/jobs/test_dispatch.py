"""What a dispatcher does with jobs and models, and with models that fail."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from pathlib import Path

import pytest

from deployments.protocol import events
from deployments.protocol.errors import BadRequest, ModelUnavailable, NodeLost
from deployments.protocol.request import ResolvedEdit
from serve_app.job_ids import new_job_id
from serve_app.jobs import events as job_events
from serve_app.jobs import inputs
from serve_app.jobs.job import Job, JobError, JobState, NewJob, ResumePoint
from serve_app.jobs.service import JobService
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker import attempt as attempt_module
from serve_app.jobs.worker import dispatch as dispatch_module
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore, StoredFile, handover_path, input_path
from tests.patience import slowness
from tests.serving.conftest import MakeSettings
from tests.serving.fakes import MODEL, OWNER, FakeModels, eventually, keys_without_ttl, picture, resolved
from tests.serving.jobs.conftest import running


async def submitted(store: JobStore, prompt: str = "a cat", model: str = MODEL) -> str:
    return (await store.accept(NewJob(new_job_id(), OWNER, resolved(prompt, model=model)))).id


async def ended(store: JobStore, job_id: str) -> Job:
    async def has_ended() -> bool:
        return (await store.get(job_id)).state.ended

    await eventually(has_ended)
    return await store.get(job_id)


async def before_the_last_step(store: JobStore, models: FakeModels, job_id: str) -> None:
    """The job runs and waits before its last step."""

    async def is_there() -> bool:
        return (await store.get(job_id)).step == models.steps - 1

    await eventually(is_there)


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_module, "RETRY_FIRST_S", 0.001)


async def test_a_job_becomes_a_stored_picture(
    store: JobStore, dispatcher: Dispatcher, service: JobService
) -> None:
    job = await ended(store, await submitted(store))

    assert (job.state, job.attempt, job.percent) == (JobState.completed, 1, 100)
    artifact, data = await service.artifact(job.id, OWNER, 0)
    assert data == picture()
    assert (artifact.seed, artifact.width, artifact.media_type) == (7, 64, "image/png")


async def test_the_events_of_a_job_come_in_order(store: JobStore, dispatcher: Dispatcher) -> None:
    job = await ended(store, await submitted(store))

    assert [event for _, event in await store.events(job.id)] == [
        job_events.JobQueued(1),
        job_events.JobStarted(1),
        job_events.Step(0, 4),
        job_events.Step(1, 4),
        job_events.Step(2, 4),
        job_events.Step(3, 4),
        job_events.Step(4, 4),
        job_events.JobCompleted(0.5),
    ]


async def test_models_never_get_more_than_they_take(
    store: JobStore, settings: Settings, results: ResultStore
) -> None:
    models = FakeModels({"a": 2, "b": 1})
    models.gate.clear()
    ids = [await submitted(store, model=model) for model in "aaaaabb"]

    async with running(Dispatcher(store, results, models, settings)):
        await eventually(lambda: models.running == 3)
        assert await store.throughput.queued(["a", "b"]) == {"a": 3, "b": 1}
        models.gate.set()
        jobs = [await ended(store, job_id) for job_id in ids]

    assert {job.state for job in jobs} == {JobState.completed}
    assert models.most_running == 3


async def test_input_images_reach_the_model_and_are_removed_at_the_end(
    store: JobStore, results: ResultStore, dispatcher: Dispatcher, models: FakeModels, tmp_path: Path
) -> None:
    edit = ResolvedEdit(image=picture("blue"), mask_image=picture("white"), strength=0.5)
    whole = resolved(edit=edit)
    detached, taken = inputs.detach(whole)
    job_id = new_job_id()
    for name, data in taken.items():
        await results.put(input_path(job_id, name), data)

    await store.accept(NewJob(job_id, OWNER, detached))
    await ended(store, job_id)

    assert models.requests == [whole]
    await eventually(lambda: not (tmp_path / "results" / "inputs" / job_id).exists())


async def test_a_lost_replica_costs_an_attempt_and_the_job_runs_again(
    store: JobStore, dispatcher: Dispatcher, models: FakeModels, quick_retries: None
) -> None:
    models.troubles = [ModelUnavailable("lost"), events.Failed("overloaded", "full", retryable=True)]

    job = await ended(store, await submitted(store))

    assert (job.state, job.attempt, job.failures) == (JobState.completed, 3, 2)


async def test_a_lost_node_costs_no_attempt(
    store: JobStore, dispatcher: Dispatcher, models: FakeModels, quick_retries: None
) -> None:
    models.troubles = [NodeLost("lost")] * 5

    job = await ended(store, await submitted(store))

    assert (job.state, job.attempt, job.failures) == (JobState.completed, 6, 0)


async def test_a_replica_lost_every_time_fails_the_job_with_the_reason(
    store: JobStore, dispatcher: Dispatcher, models: FakeModels, quick_retries: None
) -> None:
    models.troubles = [ModelUnavailable("the replica was lost")] * 3

    job = await ended(store, await submitted(store))

    assert job.state is JobState.failed
    assert job.error is not None
    assert (job.error.kind, job.error.message) == ("model_unavailable", "the replica was lost")


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (events.Failed("out_of_memory", "64x64 does not fit", retryable=False), "out_of_memory"),
        (BadRequest("no"), "bad_request"),
        (ZeroDivisionError("a bug"), "internal"),
    ],
    ids=["failed", "refused", "bug"],
)
async def test_a_permanent_failure_is_not_retried(
    store: JobStore,
    dispatcher: Dispatcher,
    models: FakeModels,
    trouble: Exception | events.Failed,
    kind: str,
) -> None:
    models.troubles = [trouble]

    job = await ended(store, await submitted(store))

    assert (job.state, job.attempt) == (JobState.failed, 1)
    assert job.error is not None
    assert job.error.kind == kind
    assert "a bug" not in job.error.message


async def test_a_model_gets_the_owner_of_each_request(
    store: JobStore, dispatcher: Dispatcher, models: FakeModels
) -> None:
    await ended(store, await submitted(store))

    assert (models.users, models.resumed) == ([OWNER], [None])


@pytest.fixture
def slow_recovery(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for recovery would exceed the test's time."""
    monkeypatch.setattr(attempt_module, "RETRY_FIRST_S", 60.0)
    monkeypatch.setattr(attempt_module, "RETRY_MAX_S", 60.0)


async def test_a_stopped_replica_hands_over_its_state_and_the_job_continues_at_once(
    store: JobStore, dispatcher: Dispatcher, models: FakeModels, slow_recovery: None, tmp_path: Path
) -> None:
    models.troubles = [events.Handover(2, b"2")]

    job = await ended(store, await submitted(store))

    assert (job.state, job.attempt, job.failures) == (JobState.completed, 2, 0)
    assert models.resumed == [None, b"2"]
    assert [event for _, event in await store.events(job.id)] == [
        job_events.JobQueued(1),
        job_events.JobStarted(1),
        job_events.Step(0, 4),
        job_events.Step(1, 4),
        job_events.Step(2, 4),
        job_events.JobQueued(1, 2, 4),
        job_events.JobStarted(2, 2, 4),
        job_events.Step(3, 4),
        job_events.Step(4, 4),
        job_events.JobCompleted(0.5),
    ]
    await eventually(lambda: not (tmp_path / "results" / "inputs" / job.id).exists())


async def test_replicas_may_be_stopped_more_often_than_a_job_may_fail(
    store: JobStore, dispatcher: Dispatcher, models: FakeModels, slow_recovery: None
) -> None:
    models.troubles = [events.Handover(step, str(step).encode()) for step in (1, 2, 2, 3)]

    job = await ended(store, await submitted(store))

    assert (job.state, job.attempt, job.failures) == (JobState.completed, 5, 0)
    assert models.resumed == [None, b"1", b"2", b"2", b"3"]


async def test_a_resumed_job_that_is_cancelled_or_fails_leaves_no_file(
    store: JobStore,
    settings: Settings,
    results: ResultStore,
    service: JobService,
    models: FakeModels,
    slow_recovery: None,
    tmp_path: Path,
) -> None:
    failure = events.Failed("out_of_memory", "it does not fit", retryable=False)
    models.troubles = [events.Handover(2, b"2"), failure]
    async with running(Dispatcher(store, results, models, settings)):
        failed = await ended(store, await submitted(store))
    waiting = await submitted(store)
    taken_by_model = await first_resume_point(store, results, waiting, b"2")

    await service.cancel(waiting, OWNER)

    assert failed.state is JobState.failed
    await eventually(lambda: not (tmp_path / "results" / "inputs" / failed.id).exists())
    assert not (tmp_path / "results" / taken_by_model.path).exists()


async def first_resume_point(store: JobStore, results: ResultStore, job_id: str, state: bytes) -> ResumePoint:
    """The resume point of a first attempt; the job waits again."""
    claim = await store.leases.claim({MODEL: 1})
    assert claim is not None
    file = await results.put(handover_path(job_id, claim.attempt), state)
    resume_point = ResumePoint(file.path, file.sha256, 2, 4)
    stopped = JobError("model_unavailable", "the replica is stopped")
    job = await store.leases.requeue(claim, stopped, counted=False, resume_point=resume_point)
    assert (job.id, job.percent, (await store.get(job_id)).resume_point) == (job_id, 50, resume_point)
    return resume_point


@pytest.mark.parametrize("harm", ["missing", "broken"])
async def test_a_lost_resume_state_restarts_the_job_and_progress_does_not_go_back(
    store: JobStore,
    settings: Settings,
    results: ResultStore,
    models: FakeModels,
    tmp_path: Path,
    harm: str,
) -> None:
    job_id = await submitted(store)
    file = tmp_path / "results" / (await first_resume_point(store, results, job_id, b"2")).path
    file.unlink()
    if harm == "broken":
        file.write_bytes(b"3")

    async with running(Dispatcher(store, results, models, settings)):
        job = await ended(store, job_id)

    assert (job.state, models.resumed) == (JobState.completed, [None])
    steps = [event.step for _, event in await store.events(job_id) if isinstance(event, job_events.Step)]
    assert steps == sorted(steps)
    assert steps[0] == 2


async def test_after_a_counted_failure_no_resume_state_is_used(
    store: JobStore, dispatcher: Dispatcher, models: FakeModels, quick_retries: None
) -> None:
    models.troubles = [events.Handover(2, b"2"), ModelUnavailable("lost")]

    job = await ended(store, await submitted(store))

    assert (job.state, job.failures, models.resumed) == (JobState.completed, 1, [None, b"2", None])


async def test_draining_a_dispatcher_keeps_the_resume_point(
    store: JobStore, settings: Settings, results: ResultStore, models: FakeModels
) -> None:
    models.gate.clear()
    job_id = await submitted(store)
    await first_resume_point(store, results, job_id, b"2")
    async with running(Dispatcher(store, results, models, settings)):
        await before_the_last_step(store, models, job_id)
    models.gate.set()

    async with running(Dispatcher(store, results, models, settings)):
        job = await ended(store, job_id)

    assert (job.state, models.resumed) == (JobState.completed, [b"2", b"2"])


async def test_a_worker_that_lost_its_job_removes_its_resume_state(
    store: JobStore, settings: Settings, results: ResultStore, models: FakeModels, tmp_path: Path
) -> None:
    models.troubles = [events.Handover(2, b"2")]
    job_id = await submitted(store)
    key = f"{settings.redis_prefix}job:{job_id}"

    class Robbed(ResultStore):
        async def put(self, path: str, data: bytes) -> StoredFile:
            await store.redis.hincrby(key, "attempt", 1)  # another worker has it by now
            return await super().put(path, data)

    robbed = Robbed(str(tmp_path / "results"), min_free_bytes=0)
    async with running(Dispatcher(store, robbed, models, settings)) as dispatcher:
        await eventually(lambda: models.resumed == [None] and dispatcher.active == 0)

    assert list((tmp_path / "results" / "inputs" / job_id).iterdir()) == []


async def test_other_jobs_continue_while_one_fails(
    store: JobStore, dispatcher: Dispatcher, models: FakeModels
) -> None:
    models.troubles = [ZeroDivisionError("a bug")]
    ids = [await submitted(store) for _ in range(5)]

    states = [(await ended(store, job_id)).state for job_id in ids]

    assert sorted(states) == [JobState.completed] * 4 + [JobState.failed]


async def test_a_running_job_is_cancelled_at_once_and_frees_its_slot(
    store: JobStore, make_settings: MakeSettings, results: ResultStore, models: FakeModels
) -> None:
    models.gate.clear()
    slow_heart = make_settings(heartbeat_s=3600.0, lease_s=7200.0)  # so only the wake-up can do it
    async with running(Dispatcher(store, results, models, slow_heart)):
        job_id = await submitted(store)
        await before_the_last_step(store, models, job_id)

        await store.cancel(job_id)
        job = await ended(store, job_id)

        assert job.state is JobState.cancelled
        assert (models.running, models.closed_early) == (0, 1)


async def test_a_silent_model_keeps_its_lease(
    store: JobStore, make_settings: MakeSettings, results: ResultStore, models: FakeModels
) -> None:
    short = make_settings(lease_s=0.3 * slowness(), heartbeat_s=0.05)
    store = JobStore(store.redis, short)
    models.gate.clear()
    async with running(Dispatcher(store, results, models, short)):
        job_id = await submitted(store)
        await before_the_last_step(store, models, job_id)
        asyncio.get_running_loop().call_later(0.9 * slowness(), models.gate.set)  # three leases later

        job = await ended(store, job_id)

    assert (job.state, job.attempt) == (JobState.completed, 1)


async def test_slow_storage_costs_no_lease(
    store: JobStore,
    make_settings: MakeSettings,
    results: ResultStore,
    models: FakeModels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = make_settings(lease_s=2.0 * slowness(), heartbeat_s=0.1)
    store = JobStore(store.redis, short)
    monkeypatch.setattr(
        os, "fsync", lambda file: time.sleep(1.5 * slowness())
    )  # of the file, and of its folder

    async with running(Dispatcher(store, results, models, short)):
        job = await ended(store, await submitted(store))

    assert (job.state, job.attempt, len(models.requests)) == (JobState.completed, 1, 1)


async def test_leases_do_not_depend_on_the_clock_of_a_dispatcher(
    store: JobStore,
    settings: Settings,
    results: ResultStore,
    models: FakeModels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true_time, jumps = time.time, itertools.cycle([0.0, 3600.0, -3600.0, 10.0, -60.0])
    monkeypatch.setattr(time, "time", lambda: true_time() + next(jumps))

    async with (
        running(Dispatcher(store, results, models, settings)),
        running(Dispatcher(store, results, models, settings)),
    ):
        jobs = [await ended(store, await submitted(store)) for _ in range(10)]

    assert {(job.state, job.attempt) for job in jobs} == {(JobState.completed, 1)}
    assert len(models.requests) == 10
    assert all(abs(job.created_at - true_time()) < 600 for job in jobs)
    assert all(job.created_at <= (job.started_at or 0) <= (job.completed_at or 0) for job in jobs)


async def test_a_job_that_runs_too_long_is_stopped_and_says_so(
    store: JobStore, settings: Settings, results: ResultStore, models: FakeModels
) -> None:
    models.gate.clear()
    limits = {MODEL: 0.05}
    async with running(Dispatcher(store, results, models, settings, time_limits_s=limits)):
        job = await ended(store, await submitted(store))

    assert job.state is JobState.failed
    assert job.error is not None
    assert "longer than 0.05 s" in job.error.message
    assert models.closed_early == 1


async def test_draining_releases_jobs_at_once_and_costs_them_no_attempt(
    store: JobStore, settings: Settings, results: ResultStore, models: FakeModels
) -> None:
    models.gate.clear()
    async with running(Dispatcher(store, results, models, settings)) as dispatcher:
        job_id = await submitted(store)
        await before_the_last_step(store, models, job_id)

        await dispatcher.drain()

        job = await store.get(job_id)
        assert (job.state, job.failures, dispatcher.active) == (JobState.queued, 0, 0)
    models.gate.set()
    async with running(Dispatcher(store, results, models, settings)):
        assert (await ended(store, job_id)).state is JobState.completed


async def test_a_cancelled_run_drains_too(
    store: JobStore, settings: Settings, results: ResultStore, models: FakeModels
) -> None:
    models.gate.clear()
    task = asyncio.create_task(Dispatcher(store, results, models, settings).run())
    job_id = await submitted(store)
    await before_the_last_step(store, models, job_id)

    task.cancel()
    await asyncio.wait({task})

    assert (await store.get(job_id)).state is JobState.queued


async def test_a_worker_that_lost_its_job_stops_and_leaves_no_files(
    store: JobStore, settings: Settings, results: ResultStore, models: FakeModels, tmp_path: Path
) -> None:
    models.gate.clear()
    async with running(Dispatcher(store, results, models, settings)) as dispatcher:
        job_id = await submitted(store)
        await before_the_last_step(store, models, job_id)
        await results.put(f"outputs/{job_id}/1-0.png", b"of the lost attempt")

        await store.redis.hincrby(f"{settings.redis_prefix}job:{job_id}", "attempt", 1)
        await eventually(lambda: dispatcher.active == 0)

    assert models.closed_early == 1
    assert list((tmp_path / "results" / "outputs" / job_id).iterdir()) == []
    assert (await store.get(job_id)).state is JobState.processing


async def test_a_full_disk_fails_the_job_and_says_so(
    store: JobStore,
    dispatcher: Dispatcher,
    models: FakeModels,
    monkeypatch: pytest.MonkeyPatch,
    quick_retries: None,
) -> None:
    def full_disk(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)

    job = await ended(store, await submitted(store))

    assert (job.state, job.attempt) == (JobState.failed, 3)
    assert job.error is not None
    assert "stored" in job.error.message


async def test_a_claim_follows_a_submit_without_polling(
    store: JobStore,
    make_settings: MakeSettings,
    results: ResultStore,
    models: FakeModels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch_module, "POLL_S", 3600.0)
    slow = make_settings(heartbeat_s=3600.0, lease_s=7200.0)
    async with running(Dispatcher(store, results, models, slow)):
        await ended(store, await submitted(store))  # it is subscribed by now
        for _ in range(10):
            job = await ended(store, await submitted(store))
            assert job.started_at is not None


async def test_two_dispatchers_share_the_work_and_nothing_runs_twice(
    store: JobStore, settings: Settings, results: ResultStore
) -> None:
    one, two = FakeModels({MODEL: 2}), FakeModels({MODEL: 2})
    one.gate.clear()
    two.gate.clear()
    ids = [await submitted(store) for _ in range(12)]

    async with (
        running(Dispatcher(store, results, one, settings)),
        running(Dispatcher(store, results, two, settings)),
    ):
        await eventually(lambda: one.running == two.running == 2)
        one.gate.set()
        two.gate.set()
        jobs = [await ended(store, job_id) for job_id in ids]

    assert [(job.state, job.attempt) for job in jobs] == [(JobState.completed, 1)] * 12
    assert len(one.requests) + len(two.requests) == 12


async def test_no_key_stays_for_ever_once_all_jobs_have_ended(
    store: JobStore, dispatcher: Dispatcher, models: FakeModels, settings: Settings
) -> None:
    models.troubles = [BadRequest("no")]
    ids = [await submitted(store) for _ in range(4)]
    await store.cancel(ids[-1])

    for job_id in ids:
        await ended(store, job_id)

    assert await keys_without_ttl(store.redis, settings.redis_prefix) == []
