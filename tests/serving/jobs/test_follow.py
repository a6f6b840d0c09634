"""Following a job from anywhere, from any point, to its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from deployments.protocol.errors import BadRequest, NotFound
from serve_app.job_ids import new_job_id
from serve_app.jobs import events as job_events
from serve_app.jobs import follow as follow_module
from serve_app.jobs.follow import FROM_START, StreamEntry, follow, wait
from serve_app.jobs.job import JobError, JobState, NewJob
from serve_app.jobs.store.key_names import Keys
from serve_app.jobs.store.leases import Claim
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.store.wakeups import Wakeups
from serve_app.redis.transactions import StoreUnreachable
from serve_app.settings import Settings
from tests.patience import patience
from tests.serving.fakes import MODEL, OWNER, eventually, resolved


@pytest.fixture
async def wakeups(store: JobStore) -> AsyncIterator[Wakeups]:
    wakeups = store.event_wakeups()
    yield wakeups
    await wakeups.aclose()


async def accepted(store: JobStore) -> str:
    return (await store.accept(NewJob(new_job_id(), OWNER, resolved()))).id


async def claimed(store: JobStore) -> Claim:
    claim = await store.leases.claim({MODEL: 1})
    assert claim is not None
    return claim


async def collected(entries: AsyncIterator[StreamEntry]) -> list[StreamEntry]:
    return [event async for event in entries]


async def test_a_follower_receives_all_events_live(store: JobStore, wakeups: Wakeups) -> None:
    job_id = await accepted(store)
    story = asyncio.create_task(collected(follow(store, wakeups, job_id)))

    claim = await claimed(store)
    await store.leases.heartbeat(claim, step=1, steps=4, pending_events=[job_events.Step(1, 4)])
    await store.leases.complete(claim, [], 1.0)

    events = [event for _, event in await asyncio.wait_for(story, patience())]
    assert events == [
        job_events.JobQueued(1),
        job_events.JobStarted(1),
        job_events.Step(1, 4),
        job_events.JobCompleted(1.0),
    ]


async def test_following_again_after_an_id_misses_and_repeats_nothing(
    store: JobStore, wakeups: Wakeups
) -> None:
    job_id = await accepted(store)
    claim = await claimed(store)
    await store.leases.complete(claim, [], 1.0)
    everything = await collected(follow(store, wakeups, job_id))

    for number, (event_id, _) in enumerate(everything[:-1]):
        assert await collected(follow(store, wakeups, job_id, event_id)) == everything[number + 1 :]


async def test_the_ending_is_sent_again_to_a_follower_that_has_it(store: JobStore, wakeups: Wakeups) -> None:
    job_id = await accepted(store)
    await store.cancel(job_id)
    last_id, _ = (await store.events(job_id))[-1]

    assert await collected(follow(store, wakeups, job_id, last_id)) == [(last_id, job_events.JobCancelled())]


@pytest.mark.parametrize(
    "ending",
    [job_events.JobCompleted(2.0), job_events.Failed("internal", "why", retryable=False, param="seed")],
)
async def test_the_ending_is_sent_though_the_stream_was_deleted(
    store: JobStore, wakeups: Wakeups, settings: Settings, ending: job_events.Event
) -> None:
    job_id = await accepted(store)
    claim = await claimed(store)
    if isinstance(ending, job_events.JobCompleted):
        await store.leases.complete(claim, [], 2.0)
    else:
        await store.leases.fail(claim, JobError("internal", "why", "seed"))
    await store.redis.delete(Keys(settings.redis_prefix).events(job_id))

    assert await collected(follow(store, wakeups, job_id)) == [(FROM_START, ending)]


async def test_positions_are_sent_again_when_they_change(
    store: JobStore, wakeups: Wakeups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_module, "POLL_S", 0.02)
    await accepted(store)
    job_id = await accepted(store)
    story = follow(store, wakeups, job_id)
    assert (await anext(story))[1] == job_events.JobQueued(2)

    await claimed(store)

    assert (await asyncio.wait_for(anext(story), patience()))[1] == job_events.JobQueued(1)
    await story.aclose()


@pytest.mark.parametrize("read", ["get", "events", "position"])
async def test_following_outlasts_a_short_outage_of_the_store(
    store: JobStore, wakeups: Wakeups, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    monkeypatch.setattr(follow_module, "POLL_S", 0.02)
    monkeypatch.setattr(follow_module, "OUTAGE_POLL_S", 0.02)
    job_id = await accepted(store)
    entries = follow(store, wakeups, job_id)
    first = await anext(entries)
    answer, outages = getattr(store, read), [StoreUnreachable("gone")] * 2

    async def answer_after_the_outage(*args: object) -> object:
        if outages:
            raise outages.pop()
        return await answer(*args)

    monkeypatch.setattr(store, read, answer_after_the_outage)
    rest = asyncio.create_task(collected(entries))
    await eventually(lambda: not outages)
    await store.cancel(job_id)

    assert first[1] == job_events.JobQueued(1)
    assert [event for _, event in await asyncio.wait_for(rest, patience())] == [job_events.JobCancelled()]


async def test_an_event_reaches_its_followers_without_polling(
    store: JobStore, wakeups: Wakeups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_module, "POLL_S", 3600.0)
    job_id = await accepted(store)
    claim = await claimed(store)
    story = follow(store, wakeups, job_id)
    await anext(story)
    await anext(story)

    for step in range(1, 21):
        arrival = asyncio.create_task(anext(story))
        await asyncio.sleep(0)
        await store.leases.heartbeat(claim, step=step, steps=20, pending_events=[job_events.Step(step, 20)])
        assert (await asyncio.wait_for(arrival, patience()))[1] == job_events.Step(step, 20)

    await story.aclose()


async def test_two_hundred_followers_share_one_subscription(store: JobStore, wakeups: Wakeups) -> None:
    job_id = await accepted(store)
    stories = [asyncio.create_task(collected(follow(store, wakeups, job_id))) for _ in range(200)]
    await wakeups.ensure_subscribed()

    await store.leases.complete(await claimed(store), [], 1.0)

    for story in await asyncio.wait_for(asyncio.gather(*stories), patience()):
        assert isinstance(story[-1][1], job_events.JobCompleted)


async def test_waiting_ends_with_the_job_without_polling(
    store: JobStore, wakeups: Wakeups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_module, "POLL_S", 3600.0)
    job_id = await accepted(store)
    waiting = asyncio.create_task(wait(store, wakeups, job_id, 2 * patience()))
    await wakeups.ensure_subscribed()

    await store.leases.complete(await claimed(store), [], 1.0)

    assert (await asyncio.wait_for(waiting, patience())).state is JobState.completed


async def test_waiting_gives_up_in_time_with_the_job_as_it_is(store: JobStore, wakeups: Wakeups) -> None:
    job_id = await accepted(store)

    began = asyncio.get_running_loop().time()
    job = await wait(store, wakeups, job_id, 0.5)
    waited_s = asyncio.get_running_loop().time() - began

    assert job.state is JobState.queued
    assert waited_s > 0.4


async def test_an_unknown_job_and_a_malformed_event_id_are_errors(store: JobStore, wakeups: Wakeups) -> None:
    job_id = await accepted(store)

    with pytest.raises(NotFound):
        await collected(follow(store, wakeups, new_job_id()))
    with pytest.raises(BadRequest):
        await collected(follow(store, wakeups, job_id, "yesterday"))


async def test_a_wakeup_for_one_job_wakes_no_other_follower(store: JobStore, wakeups: Wakeups) -> None:
    await wakeups.ensure_subscribed()
    with wakeups.subscribe("mine") as mine, wakeups.subscribe("other") as other:
        mine.clear()
        other.clear()
        await store.redis.publish(wakeups._channel, "mine")

        await eventually(mine.is_set)

        assert not other.is_set()
