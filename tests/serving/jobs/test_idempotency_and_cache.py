"""Repeated calls and repeated requests: one job, one generation, never across owners."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from deployments.protocol import events
from deployments.protocol.adjustment import Adjustment
from deployments.protocol.card import Weights
from deployments.protocol.errors import Conflict, NotFound
from deployments.protocol.request import Edit, GenerationRequest, OutputOptions
from serve_app.jobs import events as job_events
from serve_app.jobs.job import IdempotencyKey, Job, JobState
from serve_app.jobs.service import JobService
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker import attempt as attempt_module
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.redis.transactions import connect
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore, StoredFile
from tests.serving.conftest import MakeSettings
from tests.serving.fakes import CARD, MODEL, OWNER, FakeModels, eventually, keys_without_ttl, picture
from tests.serving.jobs.conftest import running
from tests.serving.jobs.test_dispatch import before_the_last_step, ended

SEEDED = GenerationRequest(model=MODEL, prompt="a cat", seed=7)
DRAWN = GenerationRequest(model=MODEL, prompt="a cat")
KEY = IdempotencyKey("order 1", "digest of the body")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"0" * 1000)
    return folder


@pytest.fixture
def make_service(
    store: JobStore, results: ResultStore, settings: Settings, weights: Path
) -> Callable[[JobStore], JobService]:
    card = CARD.model_copy(update={"weights": Weights(path=str(weights))})
    return lambda over: JobService(over, results, {MODEL: card}, settings)


@pytest.fixture
def service(store: JobStore, make_service: Callable[[JobStore], JobService]) -> JobService:
    return make_service(store)


# ---- Idempotency-Key ------------------------------------------------------------------------------


async def test_fifty_duplicate_submits_through_two_processes_give_one_job(
    store: JobStore, settings: Settings, valkey_url: str, make_service: Callable[[JobStore], JobService]
) -> None:
    async with connect(valkey_url) as other:
        services = [make_service(store), make_service(JobStore(other, settings))]

        jobs = await asyncio.gather(
            *(services[i % 2].submit(DRAWN, OWNER, idempotency_key=KEY) for i in range(50))
        )

    assert len({job.id for job in jobs}) == 1
    assert [job.id for job in (await store.page(OWNER)).jobs] == [jobs[0].id]
    assert await store.throughput.queued([MODEL]) == {MODEL: 1}


async def test_a_duplicate_after_the_end_returns_the_ended_job(
    service: JobService, store: JobStore, dispatcher: Dispatcher
) -> None:
    first = await ended(store, (await service.submit(DRAWN, OWNER, idempotency_key=KEY)).id)

    again = await service.submit(DRAWN, OWNER, idempotency_key=KEY)

    assert again == first
    assert again.state is JobState.completed


async def test_a_key_that_was_used_with_another_body_is_a_conflict(service: JobService) -> None:
    await service.submit(DRAWN, OWNER, idempotency_key=KEY)

    with pytest.raises(Conflict, match="another request") as refusal:
        await service.submit(DRAWN, OWNER, idempotency_key=IdempotencyKey(KEY.key, "another digest"))

    assert refusal.value.param == "Idempotency-Key"


async def test_equal_keys_of_different_owners_are_independent(service: JobService) -> None:
    mine, theirs = [
        await service.submit(DRAWN, owner, idempotency_key=KEY) for owner in (OWNER, "another owner")
    ]

    assert mine.id != theirs.id


async def test_deleting_a_job_frees_its_key(service: JobService) -> None:
    first = await service.submit(DRAWN, OWNER, idempotency_key=KEY)
    await service.cancel(first.id, OWNER)
    await service.delete(first.id, OWNER)

    second = await service.submit(DRAWN, OWNER, idempotency_key=KEY)
    third = await service.submit(DRAWN, OWNER, idempotency_key=KEY)

    assert second.id != first.id
    assert third == second


async def test_a_duplicate_leaves_no_input_images(service: JobService, tmp_path: Path) -> None:
    request = DRAWN.model_copy(update={"edit": Edit(image=picture())})
    first = await service.submit(request, OWNER, idempotency_key=KEY)

    await service.submit(request, OWNER, idempotency_key=KEY)

    assert [folder.name for folder in (tmp_path / "results" / "inputs").iterdir()] == [first.id]


async def test_a_duplicate_is_answered_though_the_queue_is_full(
    results: ResultStore, store: JobStore, make_settings: MakeSettings
) -> None:
    settings = make_settings(max_pending=1)
    service = JobService(JobStore(store.redis, settings), results, {MODEL: CARD}, settings)
    first = await service.submit(DRAWN, OWNER, idempotency_key=KEY)

    assert (await service.submit(DRAWN, OWNER, idempotency_key=KEY)).id == first.id


# ---- result cache ---------------------------------------------------------------------------------


async def test_a_repeated_request_gets_copies_of_the_files_without_the_model(
    service: JobService, store: JobStore, dispatcher: Dispatcher, models: FakeModels
) -> None:
    first = await ended(store, (await service.submit(SEEDED, OWNER)).id)

    second = await ended(store, (await service.submit(SEEDED, OWNER)).id)
    await service.delete(first.id, OWNER)

    assert len(models.requests) == 1
    assert (first.cached, second.cached) == (False, True)
    assert second.artifacts[0].path.startswith(f"outputs/{second.id}/")
    assert (await service.artifact(second.id, OWNER, 0))[1] == picture()


async def test_a_cached_answer_needs_no_slot_of_the_model(
    service: JobService, store: JobStore, dispatcher: Dispatcher, models: FakeModels
) -> None:
    await ended(store, (await service.submit(SEEDED, OWNER)).id)
    models.gate.clear()
    for _ in range(models.slots[MODEL]):
        await before_the_last_step(store, models, (await service.submit(DRAWN, OWNER)).id)

    again = await ended(store, (await service.submit(SEEDED, OWNER)).id)
    models.gate.set()

    assert again.cached


async def test_a_random_seed_another_owner_and_another_prompt_are_misses(
    service: JobService, store: JobStore, dispatcher: Dispatcher
) -> None:
    await ended(store, (await service.submit(SEEDED, OWNER)).id)

    others = [
        await service.submit(SEEDED, "another owner"),
        await service.submit(SEEDED.model_copy(update={"prompt": "a dog"}), OWNER),
        await service.submit(SEEDED.model_copy(update={"seed": 8}), OWNER),
        await service.submit(DRAWN, OWNER),
    ]

    assert [(await ended(store, job.id)).cached for job in others] == [False] * 4


async def test_changed_weights_are_a_miss(
    service: JobService, store: JobStore, dispatcher: Dispatcher, weights: Path
) -> None:
    await ended(store, (await service.submit(SEEDED, OWNER)).id)
    (weights / "model.safetensors").write_bytes(b"0" * 999 + b"1")

    again = await ended(store, (await service.submit(SEEDED, OWNER)).id)

    assert not again.cached


async def test_priority_and_previews_do_not_change_the_result(
    service: JobService, store: JobStore, dispatcher: Dispatcher
) -> None:
    await ended(store, (await service.submit(SEEDED, OWNER)).id)

    again = await service.submit(SEEDED.model_copy(update={"priority": "high", "deadline_s": 5.0}), OWNER)

    assert (await ended(store, again.id)).cached


async def delete_job(service: JobService, first: Job) -> None:
    await service.delete(first.id, OWNER)


async def empty_cache(service: JobService, first: Job) -> None:
    await service.empty_cache(OWNER)


@pytest.mark.parametrize("forget", [delete_job, empty_cache])
async def test_a_deleted_job_is_not_in_the_cache(
    forget: Callable[[JobService, Job], Awaitable[None]],
    service: JobService,
    store: JobStore,
    dispatcher: Dispatcher,
    models: FakeModels,
) -> None:
    await forget(service, await ended(store, (await service.submit(SEEDED, OWNER)).id))

    again = await ended(store, (await service.submit(SEEDED, OWNER)).id)

    assert not again.cached
    assert len(models.requests) == 2


async def test_lost_cached_files_are_generated_again(
    service: JobService, store: JobStore, results: ResultStore, dispatcher: Dispatcher, models: FakeModels
) -> None:
    first = await ended(store, (await service.submit(SEEDED, OWNER)).id)
    await results.sweep(first.id)

    second = await ended(store, (await service.submit(SEEDED, OWNER)).id)

    assert (second.state, second.cached, second.failures) == (JobState.completed, False, 0)
    assert len(models.requests) == 2


# ---- single flight --------------------------------------------------------------------------------


async def test_identical_requests_in_progress_are_run_once_and_end_together(
    service: JobService, store: JobStore, dispatcher: Dispatcher, models: FakeModels, settings: Settings
) -> None:
    models.gate.clear()
    leader = await service.submit(SEEDED, OWNER)
    await before_the_last_step(store, models, leader.id)
    followers = [await service.submit(SEEDED, OWNER) for _ in range(5)]
    states = {(await store.get(job.id)).state for job in followers}

    models.gate.set()
    jobs = [await ended(store, job.id) for job in (leader, *followers)]

    assert states == {JobState.queued}
    assert [job.state for job in jobs] == [JobState.completed] * 6
    assert len(models.requests) == 1
    assert [job.cached for job in jobs] == [False] + [True] * 5
    assert len({job.artifacts[0].path for job in jobs}) == 6
    assert await keys_without_ttl(store.redis, settings.redis_prefix) == [f"{settings.redis_prefix}secret"]


async def test_a_follower_has_its_leaders_position_in_the_queue(service: JobService) -> None:
    await service.submit(DRAWN, OWNER)
    await service.submit(SEEDED, OWNER)

    follower = await service.submit(SEEDED, OWNER)

    assert (await service.get(follower.id, OWNER)).position == 2


@pytest.mark.parametrize("running", [False, True])
async def test_when_the_leader_is_cancelled_the_oldest_follower_takes_its_place(
    running: bool,
    service: JobService,
    store: JobStore,
    models: FakeModels,
    results: ResultStore,
    settings: Settings,
) -> None:
    models.gate.clear()
    leader, new_leader, third = [await service.submit(SEEDED, OWNER) for _ in range(3)]
    dispatcher = Dispatcher(store, results, models, settings)
    task = asyncio.create_task(dispatcher.run())
    if running:
        await before_the_last_step(store, models, leader.id)
    await service.cancel(leader.id, OWNER)
    await before_the_last_step(store, models, new_leader.id)
    assert (await store.get(third.id)).leader == new_leader.id
    fourth = await service.submit(SEEDED, OWNER)
    assert fourth.leader == new_leader.id, "the new leader answers the cache key"

    models.gate.set()
    jobs = [await ended(store, job.id) for job in (leader, new_leader, third, fourth)]
    await dispatcher.drain()
    await task

    assert [job.state.value for job in jobs] == ["cancelled", *["completed"] * 3]
    assert [job.cached for job in jobs] == [False, False, True, True]
    assert len(models.requests) == 1 + running, "only the leaders ran"


async def test_a_follower_may_be_cancelled_alone(
    service: JobService, store: JobStore, dispatcher: Dispatcher, models: FakeModels
) -> None:
    models.gate.clear()
    leader, follower = [await service.submit(SEEDED, OWNER) for _ in range(2)]

    cancelled = await service.cancel(follower.id, OWNER)
    models.gate.set()

    assert cancelled.state is JobState.cancelled
    assert (await ended(store, leader.id)).state is JobState.completed
    assert (await store.get(follower.id)).state is JobState.cancelled


async def test_when_the_leader_fails_for_good_so_do_its_followers(
    service: JobService, store: JobStore, models: FakeModels, results: ResultStore, settings: Settings
) -> None:
    models.troubles = [events.Failed("out_of_memory", "too large", retryable=False)]
    jobs = [await service.submit(SEEDED, OWNER) for _ in range(3)]
    dispatcher = Dispatcher(store, results, models, settings)
    task = asyncio.create_task(dispatcher.run())

    failed = [await ended(store, job.id) for job in jobs]
    again = await ended(store, (await service.submit(SEEDED, OWNER)).id)
    await dispatcher.drain()
    await task

    assert {job.error and job.error.kind for job in failed} == {"out_of_memory"}
    assert len(models.requests) == 2
    assert (again.state, again.cached) == (JobState.completed, False)
    for job in failed:
        published = [event for _, event in await store.events(job.id)]
        assert isinstance(published[-1], job_events.Failed)


async def test_a_leader_that_ran_too_long_fails_alone(
    service: JobService, store: JobStore, models: FakeModels, results: ResultStore, settings: Settings
) -> None:
    models.gate.clear()
    leader, new_leader, third = [await service.submit(SEEDED, OWNER) for _ in range(3)]
    limits = {MODEL: 0.2}
    async with running(Dispatcher(store, results, models, settings, time_limits_s=limits)):
        await eventually(lambda: bool(models.requests))
        limits[MODEL] = 60.0  # of the next attempt
        late = await ended(store, leader.id)
        models.gate.set()
        jobs = [await ended(store, job.id) for job in (new_leader, third)]

    assert (late.state, late.error and late.error.kind) == (JobState.failed, "internal")
    assert [job.state for job in jobs] == [JobState.completed] * 2
    assert [job.cached for job in jobs] == [False, True]
    assert len(models.requests) == 2


async def test_a_leader_whose_files_could_not_be_stored_fails_alone(
    service: JobService,
    store: JobStore,
    models: FakeModels,
    results: ResultStore,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attempt_module, "RETRY_FIRST_S", 0.001)
    whole = results.put
    refused: list[str] = []

    async def full_at_first(path: str, data: bytes) -> StoredFile:
        if leader.id in path:
            refused.append(path)
            raise OSError(28, "No space left on device")
        return await whole(path, data)

    monkeypatch.setattr(results, "put", full_at_first)
    leader, follower = [await service.submit(SEEDED, OWNER) for _ in range(2)]
    async with running(Dispatcher(store, results, models, settings)):
        unlucky, lucky = [await ended(store, job.id) for job in (leader, follower)]

    assert len(refused) == settings.max_attempts
    assert (unlucky.state, lucky.state) == (JobState.failed, JobState.completed)
    assert not lucky.cached


async def test_a_follower_drops_a_leader_that_was_deleted(
    service: JobService, store: JobStore, dispatcher: Dispatcher
) -> None:
    first = await ended(store, (await service.submit(SEEDED, OWNER)).id)
    await service.delete(first.id, OWNER)

    with pytest.raises(NotFound):
        await store.get(first.id)
    await eventually(lambda: True)
    assert (await service.submit(SEEDED, OWNER)).cached_from is None


# ---- previews ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("previews", "steps"), [(0, []), (1, [2]), (2, [1, 3]), (3, [1, 2, 3]), (8, [1, 2, 3])]
)
async def test_a_copy_shows_the_result_as_often_as_a_computed_job_shows_what_it_has(
    previews: int,
    steps: list[int],
    service: JobService,
    store: JobStore,
    dispatcher: Dispatcher,
    models: FakeModels,
) -> None:
    models.file_kinds = ["image", "thumbnail"]
    await ended(store, (await service.submit(SEEDED, OWNER)).id)

    wanted = SEEDED.model_copy(update={"output": OutputOptions(previews=previews)})
    copy = await ended(store, (await service.submit(wanted, OWNER)).id)

    assert copy.cached
    published = [event for _, event in await store.events(copy.id)]
    shown = [event for event in published if isinstance(event, job_events.Preview)]
    assert shown == [job_events.Preview(step, "image/png", picture()) for step in steps]
    assert isinstance(published[-1], job_events.JobCompleted)


async def test_a_copy_whose_original_has_no_thumbnail_is_complete_without_previews(
    service: JobService, store: JobStore, dispatcher: Dispatcher
) -> None:
    await ended(store, (await service.submit(SEEDED, OWNER)).id)

    wanted = SEEDED.model_copy(update={"output": OutputOptions(previews=2)})
    copy = await ended(store, (await service.submit(wanted, OWNER)).id)

    assert (copy.cached, copy.state) == (True, JobState.completed)


# ---- exactness ------------------------------------------------------------------------------------


async def test_a_warning_about_the_files_goes_with_every_copy_of_them(
    service: JobService, store: JobStore, dispatcher: Dispatcher, models: FakeModels
) -> None:
    models.merged_unproven = ("UNet.forward",)
    waiting = await service.submit(SEEDED, OWNER)
    follower = await service.submit(SEEDED, OWNER)

    first, second = await ended(store, waiting.id), await ended(store, follower.id)
    third = await ended(store, (await service.submit(SEEDED, OWNER)).id)

    assert len(models.requests) == 1
    for job in (first, second, third):
        assert [(warning.code, warning.param) for warning in job.warnings] == [("merged_unproven", "exact")]
        assert "UNet.forward" in job.warnings[0].message


async def test_a_warning_found_while_the_job_ran_goes_with_every_copy_of_its_files(
    service: JobService, store: JobStore, dispatcher: Dispatcher, models: FakeModels
) -> None:
    models.warnings = (Adjustment("mask_empty", "mask_image", "it edits nothing", of_result=True),)

    first = await ended(store, (await service.submit(SEEDED, OWNER)).id)
    copy = await ended(store, (await service.submit(SEEDED, OWNER)).id)

    assert (first.cached, copy.cached) == (False, True)
    assert first.warnings == copy.warnings == models.warnings


async def test_a_strict_request_is_not_answered_by_a_result_that_only_preferred_exactness(
    service: JobService, store: JobStore, dispatcher: Dispatcher, models: FakeModels
) -> None:
    models.merged_unproven = ("UNet.forward",)
    await ended(store, (await service.submit(SEEDED, OWNER)).id)
    models.merged_unproven = ()

    strict = SEEDED.model_copy(update={"exact": "strict"})
    first = await ended(store, (await service.submit(strict, OWNER)).id)
    again = await ended(store, (await service.submit(strict, OWNER)).id)

    assert [request.exact for request in models.requests] == ["prefer", "strict"]
    assert (first.cached, first.warnings) == (False, ())
    assert (again.cached, again.warnings) == (True, ())


async def test_a_strict_request_does_not_wait_for_one_that_only_prefers_exactness(
    service: JobService, store: JobStore, dispatcher: Dispatcher, models: FakeModels
) -> None:
    models.gate.clear()
    preferred = await service.submit(SEEDED, OWNER)
    strict = await service.submit(SEEDED.model_copy(update={"exact": "strict"}), OWNER)
    await eventually(lambda: models.running == 2)
    models.gate.set()

    assert not (await ended(store, preferred.id)).cached
    assert not (await ended(store, strict.id)).cached


async def test_a_warning_of_an_attempt_that_failed_is_not_kept(
    service: JobService, store: JobStore, dispatcher: Dispatcher, models: FakeModels
) -> None:
    models.merged_unproven = ("UNet.forward",)
    models.troubles = [events.Failed("model_unavailable", "the replica is stopped", retryable=True)]

    job = await ended(store, (await service.submit(SEEDED, OWNER)).id)

    assert [warning.code for warning in job.warnings] == ["merged_unproven"]
