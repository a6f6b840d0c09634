"""The life of a job in the store, one rule at a time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.errors import BadRequest, Conflict, NotFound, Overloaded, RateLimited
from serve_app.job_ids import new_job_id
from serve_app.jobs import events
from serve_app.jobs.job import JobError, JobState, NewJob, StoredArtifact
from serve_app.jobs.store.key_names import Keys
from serve_app.jobs.store.leases import Claim, StaleClaim
from serve_app.jobs.store.owner_index import JobFilter
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.store.transitions import Placement
from serve_app.settings import Settings
from tests.serving.conftest import MakeSettings
from tests.serving.fakes import MODEL, OWNER, keys_without_ttl, resolved

ONE_SLOT = {MODEL: 1}
ARTIFACT = StoredArtifact(0, "image", "outputs/x/1-0.png", "image/png", 3, "abc", 64, 64, 7)
BROKEN = JobError("model_unavailable", "the replica was lost")


async def accepted(store: JobStore, prompt: str = "a cat", owner: str = OWNER, model: str = MODEL) -> str:
    return (await store.accept(NewJob(new_job_id(), owner, resolved(prompt, model=model)))).id


async def claimed(store: JobStore, model: str = MODEL) -> Claim:
    claim = await store.leases.claim({model: 1})
    assert claim is not None
    return claim


async def let_the_lease_run_out(redis: Redis, settings: Settings, job_id: str) -> None:
    keys = Keys(settings.redis_prefix)
    await redis.hset(keys.job(job_id), "lease_us", "1")
    await redis.zadd(keys.running, {job_id: 1})


async def published(store: JobStore, job_id: str) -> list[events.Event]:
    return [event for _, event in await store.events(job_id)]


async def test_an_accepted_job_is_read_back_as_it_was(store: JobStore) -> None:
    warnings = (Adjustment("steps_corrected", "num_inference_steps", "30 -> 4"),)
    request = resolved("größer\r\n\x00")

    job = await store.accept(NewJob(new_job_id(), OWNER, request, warnings))

    assert await store.get(job.id) == job
    assert (job.state, job.request, job.warnings) == (JobState.queued, request, warnings)
    assert await store.position(job) == 1
    assert await published(store, job.id) == [events.JobQueued(1)]


async def test_accepting_the_same_id_again_changes_nothing(store: JobStore) -> None:
    first = await store.accept(NewJob(new_job_id(), OWNER, resolved("first")))

    again = await store.accept(NewJob(first.id, OWNER, resolved("second")))

    assert again == first
    assert await store.throughput.queued([MODEL]) == {MODEL: 1}


async def test_an_unknown_job_is_not_found(store: JobStore) -> None:
    with pytest.raises(NotFound, match="no such job"):
        await store.get(new_job_id())


async def test_a_full_queue_rejects_with_a_time_to_retry(redis: Redis, make_settings: MakeSettings) -> None:
    store = JobStore(redis, make_settings(max_pending=2))
    await accepted(store, owner="one")
    await accepted(store, owner="two", model="other")

    with pytest.raises(Overloaded) as refusal:
        await accepted(store, owner="three")

    assert refusal.value.retry_after_s
    await claimed(store)
    await accepted(store, owner="three")


async def test_an_owner_has_a_limit_that_concurrent_submits_cannot_pass(
    redis: Redis, make_settings: MakeSettings
) -> None:
    settings = make_settings(max_active_per_owner=5)
    stores = [JobStore(redis, settings) for _ in range(3)]  # as in three processes

    answers = await asyncio.gather(
        *(accepted(stores[number % 3]) for number in range(24)), return_exceptions=True
    )

    refused = [answer for answer in answers if isinstance(answer, RateLimited)]
    assert len(refused) == 24 - 5
    await accepted(stores[0], owner="another owner")


async def test_accepts_for_several_owners_in_several_processes_never_wait_for_each_other(
    redis: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = JobStore(redis, settings), JobStore(redis, settings)
    await accepted(here, owner="one")  # a job waits, as under load
    door = here._acceptance
    place, reads = door._placement, 0

    async def slow(*of_the_job: Any) -> Placement:
        nonlocal reads
        reads += 1
        found = await place(*of_the_job)
        await accepted(there, owner="two")
        await claimed(there)
        return found

    monkeypatch.setattr(door, "_placement", slow)
    await accepted(here, owner="three")

    assert reads == 1, "it was not disturbed"


async def test_a_running_job_counts_for_its_owner_until_it_ends(
    redis: Redis, make_settings: MakeSettings
) -> None:
    store = JobStore(redis, make_settings(max_active_per_owner=1))
    await accepted(store)
    claim = await claimed(store)
    with pytest.raises(RateLimited):
        await accepted(store)

    await store.leases.complete(claim, [], 1.0)

    await accepted(store)


async def test_jobs_are_claimed_oldest_first_across_models_with_free_slots(store: JobStore) -> None:
    first = await accepted(store, model="a")
    second = await accepted(store, model="b")
    third = await accepted(store, model="a")

    order = [await store.leases.claim({"a": 1, "b": 1}) for _ in range(4)]

    assert [claim and claim.job.id for claim in order] == [first, second, third, None]


async def test_only_models_with_free_slots_are_claimed_for(store: JobStore) -> None:
    await accepted(store, model="full")

    assert await store.leases.claim({"full": 0, "other": 3}) is None
    assert await store.leases.claim({}) is None


async def test_a_job_is_claimed_once_by_many_dispatchers(store: JobStore) -> None:
    for _ in range(5):
        await accepted(store)

    claims = await asyncio.gather(*(store.leases.claim(ONE_SLOT) for _ in range(12)))

    won = [claim.job.id for claim in claims if claim]
    assert len(won) == len(set(won)) == 5


async def test_positions_count_down_as_jobs_are_claimed(store: JobStore) -> None:
    await accepted(store)
    await accepted(store, model="other")
    last = await store.get(await accepted(store))
    assert await store.position(last) == 2

    claim = await claimed(store)

    assert await store.position(last) == 1
    assert await store.position(claim.job) is None


async def test_a_completed_job_names_its_files(store: JobStore) -> None:
    await accepted(store)
    claim = await claimed(store)

    job = await store.leases.complete(claim, [ARTIFACT], 1.5)

    assert job == await store.get(job.id)
    assert (job.state, job.artifacts, job.generation_s) == (JobState.completed, (ARTIFACT,), 1.5)
    assert job.started_at is not None
    assert job.completed_at is not None
    assert job.created_at <= job.started_at <= job.completed_at
    assert await published(store, job.id) == [
        events.JobQueued(1),
        events.JobStarted(1),
        events.JobCompleted(1.5),
    ]


async def test_a_failed_job_keeps_its_error(store: JobStore) -> None:
    await accepted(store)

    job = await store.leases.fail(await claimed(store), JobError("out_of_memory", "too big", "width"))

    assert await store.get(job.id) == job
    assert (await published(store, job.id))[-1] == events.Failed(
        "out_of_memory", "too big", retryable=False, param="width"
    )


async def test_progress_never_goes_back_within_an_attempt(store: JobStore) -> None:
    await accepted(store)
    claim = await claimed(store)

    await store.leases.heartbeat(claim, step=3, steps=4, pending_events=[events.Step(3, 4)])
    await store.leases.heartbeat(claim, step=2, steps=5)
    await store.leases.heartbeat(claim)

    job = await store.get(claim.job.id)
    assert (job.step, job.steps, job.percent) == (3, 5, 60)
    assert (await published(store, job.id))[-1] == events.Step(3, 4)


async def test_a_lost_job_returns_at_its_old_position(
    store: JobStore, redis: Redis, settings: Settings
) -> None:
    lost = await accepted(store)
    later = await accepted(store)
    await claimed(store)
    assert await store.leases.reap() == []

    await let_the_lease_run_out(redis, settings, lost)
    reaped = await store.leases.reap()

    assert [(job.id, job.state, job.failures) for job in reaped] == [(lost, JobState.queued, 1)]
    assert await store.position(await store.get(lost)) == 1
    assert await store.position(await store.get(later)) == 2
    assert (await claimed(store)).attempt == 2


async def test_a_heartbeat_saves_a_job_whose_lease_ran_out(
    store: JobStore, redis: Redis, settings: Settings
) -> None:
    job_id = await accepted(store)
    claim = await claimed(store)
    await let_the_lease_run_out(redis, settings, job_id)

    await store.leases.heartbeat(claim)

    assert await store.leases.reap() == []


async def test_a_lease_renewed_while_the_reaper_reads_is_left_alone(
    store: JobStore, redis: Redis, settings: Settings
) -> None:
    job_id = await accepted(store)
    await claimed(store)
    await redis.zadd(Keys(settings.redis_prefix).running, {job_id: 1})  # what the reaper read before

    assert await store.leases.reap() == []
    assert (await store.get(job_id)).state is JobState.processing


async def test_no_write_of_a_stale_claim_is_accepted(
    store: JobStore, redis: Redis, settings: Settings
) -> None:
    job_id = await accepted(store)
    zombie = await claimed(store)
    await let_the_lease_run_out(redis, settings, job_id)
    await store.leases.reap()

    for _ in ("while it waits again", "while another runs it"):
        with pytest.raises(StaleClaim):
            await store.leases.heartbeat(zombie, step=4, steps=4)
        with pytest.raises(StaleClaim):
            await store.leases.complete(zombie, [ARTIFACT], 1.0)
        with pytest.raises(StaleClaim):
            await store.leases.fail(zombie, BROKEN)
        await store.leases.claim(ONE_SLOT)

    with pytest.raises(StaleClaim):
        await store.leases.requeue(zombie, BROKEN)
    assert (await store.get(job_id)).artifacts == ()


async def test_a_job_that_kills_its_workers_is_given_up(
    store: JobStore, redis: Redis, settings: Settings
) -> None:
    job_id = await accepted(store)

    for _ in range(settings.max_attempts):
        await claimed(store)
        await let_the_lease_run_out(redis, settings, job_id)
        await store.leases.reap()

    job = await store.get(job_id)
    assert job.state is JobState.failed
    assert job.error is not None
    assert job.error.kind == "internal"
    assert "lost 3 times" in job.error.message
    assert await store.leases.claim(ONE_SLOT) is None


async def test_a_drained_attempt_does_not_count(store: JobStore, settings: Settings) -> None:
    await accepted(store)

    for _ in range(settings.max_attempts + 1):
        await store.leases.requeue(await claimed(store), BROKEN, counted=False)

    claim = await claimed(store)
    assert claim.attempt == settings.max_attempts + 2
    assert claim.job.failures == 0


async def test_a_job_released_too_often_fails_with_the_last_reason(
    store: JobStore, settings: Settings
) -> None:
    await accepted(store)

    for _ in range(settings.max_attempts):
        job = await store.leases.requeue(await claimed(store), BROKEN)

    assert (job.state, job.error) == (JobState.failed, BROKEN)


async def test_a_waiting_job_is_cancelled_at_once(store: JobStore) -> None:
    job_id = await accepted(store)

    job = await store.cancel(job_id)

    assert job.state is JobState.cancelled
    assert await store.leases.claim(ONE_SLOT) is None
    assert await published(store, job_id) == [events.JobQueued(1), events.JobCancelled()]


async def test_a_running_job_is_marked_and_ends_as_cancelled_even_if_it_completes(
    store: JobStore,
) -> None:
    job_id = await accepted(store)
    claim = await claimed(store)

    marked = await store.cancel(job_id)
    asked = await store.leases.heartbeat(claim)
    ended = await store.leases.complete(claim, [ARTIFACT], 1.0)

    assert (marked.state, marked.cancel_requested) == (JobState.processing, True)
    assert asked
    assert (ended.state, ended.artifacts) == (JobState.cancelled, ())


@pytest.mark.parametrize("way", ["reaped", "given back", "failed"])
async def test_a_cancelled_job_never_comes_back(
    store: JobStore, redis: Redis, settings: Settings, way: str
) -> None:
    job_id = await accepted(store)
    claim = await claimed(store)
    await store.cancel(job_id)

    if way == "reaped":
        await let_the_lease_run_out(redis, settings, job_id)
        await store.leases.reap()
    elif way == "given back":
        await store.leases.requeue(claim, BROKEN)
    else:
        await store.leases.fail(claim, BROKEN)

    assert (await store.get(job_id)).state is JobState.cancelled


async def test_cancelling_an_ended_job_leaves_it_as_it_is(store: JobStore) -> None:
    job_id = await accepted(store)
    await store.leases.complete(await claimed(store), [ARTIFACT], 1.0)

    assert (await store.cancel(job_id)).state is JobState.completed


@pytest.mark.parametrize("ending", ["complete", "fail", "cancelled", "requeue"])
async def test_a_write_whose_answer_was_lost_may_be_repeated(store: JobStore, ending: str) -> None:
    await accepted(store)
    claim = await claimed(store)
    writes = {
        "complete": lambda: store.leases.complete(claim, [ARTIFACT], 1.0),
        "fail": lambda: store.leases.fail(claim, BROKEN),
        "cancelled": lambda: store.leases.cancelled(claim),
        "requeue": lambda: store.leases.requeue(claim, BROKEN),
    }

    first = await writes[ending]()

    assert await writes[ending]() == first
    endings = [event for event in await published(store, first.id) if isinstance(event, events.ENDINGS)]
    assert len(endings) == (0 if ending == "requeue" else 1)


async def test_only_an_ended_job_is_deleted_and_nothing_remains(
    store: JobStore, redis: Redis, settings: Settings
) -> None:
    job_id = await accepted(store)
    with pytest.raises(Conflict, match="cancel it first"):
        await store.delete(job_id)
    await store.cancel(job_id)

    await store.delete(job_id)

    with pytest.raises(NotFound):
        await store.get(job_id)
    assert (await store.page(OWNER)).jobs == ()
    assert await store.events(job_id) == []
    left = {key async for key in redis.scan_iter(f"{settings.redis_prefix}*")}
    today = await store.usage.today()
    assert left == {
        settings.redis_prefix + name for name in ("arrivals", "fairqueue:fake", f"usage:{today}")
    }  # with no job in them


async def test_a_job_deleted_under_a_zombie_makes_it_stale(store: JobStore) -> None:
    job_id = await accepted(store)
    zombie = await claimed(store)
    await store.leases.requeue(zombie, BROKEN, counted=False)
    await store.cancel(job_id)
    await store.delete(job_id)

    with pytest.raises(StaleClaim):
        await store.leases.complete(zombie, [ARTIFACT], 1.0)


async def test_no_key_stays_for_ever_once_the_jobs_have_ended(
    store: JobStore, redis: Redis, settings: Settings
) -> None:
    for _ in range(4):
        await accepted(store)
    await store.leases.complete(await claimed(store), [ARTIFACT], 1.0)
    await store.leases.fail(await claimed(store), BROKEN)
    await store.cancel((await claimed(store)).job.id)
    for claim in await store.redis.zrange(Keys(settings.redis_prefix).running, 0, -1):
        await let_the_lease_run_out(redis, settings, str(claim))
    await store.leases.reap()
    await store.cancel((await claimed(store)).job.id)
    assert await keys_without_ttl(redis, settings.redis_prefix) != []

    for job_id in await redis.zrange(Keys(settings.redis_prefix).running, 0, -1):
        await let_the_lease_run_out(redis, settings, str(job_id))
    await store.leases.reap()

    assert await keys_without_ttl(redis, settings.redis_prefix) == []


async def test_lists_come_newest_first_page_by_page(store: JobStore) -> None:
    ids = [await accepted(store) for _ in range(7)]
    await accepted(store, owner="another owner")
    listed: list[str] = []
    cursor: str | None = None

    for _ in range(3):
        page = await store.page(OWNER, cursor=cursor, limit=3)
        listed += [job.id for job in page.jobs]
        cursor = page.next_cursor

    assert listed == ids[::-1]
    assert cursor is None


async def test_a_page_that_holds_everything_has_no_next(store: JobStore) -> None:
    await accepted(store)

    assert (await store.page(OWNER, limit=1)).next_cursor is None


async def test_lists_are_filtered_by_state_and_model(store: JobStore) -> None:
    await accepted(store, model="a")
    await accepted(store, model="b")
    waiting = await accepted(store, model="a")
    await store.leases.complete(await claimed(store, "a"), [], 1.0)

    found = await store.page(OWNER, where=JobFilter(JobState.queued, "a"))
    done = await store.page(OWNER, where=JobFilter(JobState.completed))

    assert [job.id for job in found.jobs] == [waiting]
    assert len(done.jobs) == 1


async def test_a_rare_filter_is_answered_in_short_pages_that_lead_to_the_end(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.jobs.store.owner_index.CHUNK", 2)
    monkeypatch.setattr("serve_app.jobs.store.owner_index.CHUNKS", 2)
    rare = {number: await accepted(store, model="ab"[number in {0, 7}]) for number in range(12)}
    pages: list[list[str]] = []
    cursor: str | None = None

    for _ in range(4):
        page = await store.page(OWNER, cursor=cursor, limit=5, where=JobFilter(model="b"))
        pages.append([job.id for job in page.jobs])
        cursor = page.next_cursor

    assert pages == [[], [rare[7]], [rare[0]], []]
    assert cursor is None


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6, 7])
async def test_every_job_is_listed_once_whatever_the_size_of_a_page(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr("serve_app.jobs.store.owner_index.CHUNK", 3)
    ids = [await accepted(store) for _ in range(6)]
    listed: list[str] = []
    cursor: str | None = None

    for _ in range(-(-len(ids) // limit)):
        page = await store.page(OWNER, cursor=cursor, limit=limit)
        listed += [job.id for job in page.jobs]
        cursor = page.next_cursor

    assert listed == ids[::-1]
    assert cursor is None


async def test_jobs_of_the_same_microsecond_are_all_listed(
    store: JobStore, redis: Redis, settings: Settings
) -> None:
    ids = {await accepted(store) for _ in range(5)}
    await redis.zadd(Keys(settings.redis_prefix).owner(OWNER), dict.fromkeys(ids, 1_000))
    listed: list[str] = []
    cursor: str | None = None

    for _ in range(5):
        page = await store.page(OWNER, cursor=cursor, limit=1)
        listed += [job.id for job in page.jobs]
        cursor = page.next_cursor

    assert set(listed) == ids
    assert cursor is None


async def test_an_expired_job_leaves_the_list(store: JobStore, redis: Redis, settings: Settings) -> None:
    keys = Keys(settings.redis_prefix)
    forgotten = await accepted(store)
    await store.cancel(forgotten)
    await redis.delete(keys.job(forgotten))

    assert (await store.page(OWNER)).jobs == ()
    assert await redis.zcard(keys.owner(OWNER)) == 0


@pytest.mark.parametrize("cursor", ["", "x", "1-2", "99999999999999999999-" + "0" * 32, "' OR 1"])
async def test_a_malformed_cursor_is_a_bad_request(store: JobStore, cursor: str) -> None:
    with pytest.raises(BadRequest, match="cursor") as refusal:
        await store.page(OWNER, cursor=cursor)

    assert refusal.value.param == "cursor"


async def test_events_are_replayed_after_an_id_and_bounded(redis: Redis, make_settings: MakeSettings) -> None:
    store = JobStore(redis, make_settings(events_kept=16))
    job_id = await accepted(store)
    claim = await claimed(store)
    for step in range(1, 41):
        await store.leases.heartbeat(claim, step=step, steps=40, pending_events=[events.Step(step, 40)])

    everything = await store.events(job_id)
    rest = await store.events(job_id, everything[-3][0])

    assert len(everything) == 16
    assert [event for _, event in rest] == [events.Step(39, 40), events.Step(40, 40)]


@pytest.mark.parametrize("after", ["", "$", "x", "-", "1", "1-1-1", "9" * 40 + "-1"])
async def test_a_malformed_event_id_is_a_bad_request(store: JobStore, after: str) -> None:
    with pytest.raises(BadRequest):
        await store.events(new_job_id(), after)


async def test_a_preview_survives_the_store(store: JobStore) -> None:
    await accepted(store)
    claim = await claimed(store)
    preview = events.Preview(1, "image/webp", bytes(range(256)))

    await store.leases.heartbeat(claim, pending_events=[preview])

    assert (await published(store, claim.job.id))[-1] == preview
