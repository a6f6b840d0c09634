"""What happens between the reading and the writing of a transaction, and to jobs that wait for another."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from deployments.protocol.errors import NotFound
from serve_app.job_ids import new_job_id
from serve_app.jobs.job import Job, JobError, JobState, NewJob, SubmitOptions
from serve_app.jobs.store.endings import CoalescedGroup
from serve_app.jobs.store.key_names import Keys
from serve_app.jobs.store.leases import Claim, StaleClaim
from serve_app.jobs.store.reads import read_group
from serve_app.jobs.store.store import JobStore
from serve_app.redis.transactions import clock_us
from serve_app.settings import Settings
from tests.serving.fakes import OWNER, keys_without_ttl, resolved
from tests.serving.jobs.test_job_store import ARTIFACT, BROKEN, accepted, claimed, let_the_lease_run_out

Act = Callable[[], Awaitable[object]]
Meanwhile = Callable[..., None]


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Meanwhile:
    """Lets another client act while a transaction reads the clock, between its other reads and its writes."""

    def arrange(act: Act, *, module: str = "leases", reading: int = 1) -> None:
        """reading: which reading of the clock, from 1."""
        readings = itertools.count(1)

        async def read(redis: Redis | Pipeline) -> int:
            if next(readings) == reading:
                await act()
            return await clock_us(redis)

        monkeypatch.setattr(f"serve_app.jobs.store.{module}.clock_us", read)

    return arrange


async def test_a_job_that_is_cancelled_during_its_claim_is_not_claimed(
    store: JobStore, meanwhile: Meanwhile
) -> None:
    first, second = await accepted(store), await accepted(store)
    meanwhile(lambda: store.cancel(first))

    claim = await claimed(store)

    assert claim.job.id == second
    assert (await store.get(first)).state is JobState.cancelled


async def test_a_lease_that_is_renewed_during_its_reaping_is_left_alone(
    store: JobStore, redis: Redis, settings: Settings, meanwhile: Meanwhile
) -> None:
    job_id = await accepted(store)
    claim = await claimed(store)
    await let_the_lease_run_out(redis, settings, job_id)
    meanwhile(lambda: store.leases.heartbeat(claim), reading=2)

    assert await store.leases.reap() == []

    assert (await store.get(job_id)).state is JobState.processing


async def test_a_heartbeat_sees_a_cancellation_that_comes_during_it(
    store: JobStore, meanwhile: Meanwhile
) -> None:
    job_id = await accepted(store)
    claim = await claimed(store)
    meanwhile(lambda: store.cancel(job_id))

    assert await store.leases.heartbeat(claim, step=1, steps=4)

    assert (await store.get(job_id)).step == 1


async def test_a_job_that_is_cancelled_during_its_completion_ends_as_cancelled(
    store: JobStore, meanwhile: Meanwhile
) -> None:
    job_id = await accepted(store)
    claim = await claimed(store)
    meanwhile(lambda: store.cancel(job_id))

    job = await store.leases.complete(claim, [ARTIFACT], 1.0)

    assert (job.state, job.artifacts) == (JobState.cancelled, ())
    assert await store.get(job_id) == job


async def test_a_job_that_is_reaped_during_its_completion_is_not_completed(
    store: JobStore, redis: Redis, settings: Settings, meanwhile: Meanwhile
) -> None:
    job_id = await accepted(store)
    claim = await claimed(store)
    await let_the_lease_run_out(redis, settings, job_id)
    meanwhile(store.leases.reap)

    with pytest.raises(StaleClaim):
        await store.leases.complete(claim, [ARTIFACT], 1.0)

    assert (await store.get(job_id)).state is JobState.queued


async def test_a_job_that_is_claimed_during_its_cancellation_is_marked(
    store: JobStore, meanwhile: Meanwhile
) -> None:
    job_id = await accepted(store)
    meanwhile(lambda: claimed(store), module="store")

    job = await store.cancel(job_id)

    assert (job.state, job.cancel_requested) == (JobState.processing, True)
    assert await store.get(job_id) == job


async def test_a_job_that_is_deleted_while_its_files_expire_leaves_no_record(
    store: JobStore, redis: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await accepted(store)
    await store.leases.complete(await claimed(store), [ARTIFACT], 1.0)

    async def read_group_late(*args: Any) -> CoalescedGroup:
        with suppress(NotFound):
            await store.delete(job_id)
        return await read_group(*args)

    monkeypatch.setattr("serve_app.jobs.store.file_expiry.read_group", read_group_late)

    with pytest.raises(NotFound):
        await store.file_expiry.expire(job_id)

    assert await redis.exists(Keys(settings.redis_prefix).job(job_id)) == 0


# ---- jobs that wait for an identical one ---------------------------------------------------------------


async def leader_and_follower(store: JobStore) -> tuple[Job, Job]:
    """Two identical jobs; the second waits for the files of the first."""
    options = SubmitOptions(cache_key="k" * 64)
    leader, follower = [
        await store.accept(NewJob(new_job_id(), OWNER, resolved(), options=options)) for _ in range(2)
    ]
    assert follower.leader == leader.id
    return leader, follower


async def test_when_the_leaders_workers_are_lost_for_good_its_followers_fail_too(
    store: JobStore, redis: Redis, settings: Settings
) -> None:
    leader, follower = await leader_and_follower(store)
    for _ in range(settings.max_attempts):
        assert (await claimed(store)).job.id == leader.id
        await let_the_lease_run_out(redis, settings, leader.id)
        await store.leases.reap()

    ended = [await store.get(job.id) for job in (leader, follower)]

    assert [job.state for job in ended] == [JobState.failed] * 2
    assert ended[0].error == ended[1].error
    assert await keys_without_ttl(redis, settings.redis_prefix) == []


async def test_expired_files_are_not_copied(store: JobStore, redis: Redis, settings: Settings) -> None:
    leader, _ = await leader_and_follower(store)
    await store.leases.complete(await claimed(store), [ARTIFACT], 1.0)
    options = SubmitOptions(cache_key="k" * 64)

    early = await store.accept(NewJob(new_job_id(), OWNER, resolved(), options=options))
    await store.file_expiry.expire(leader.id)
    answered = await redis.exists(Keys(settings.redis_prefix).cache_key("k" * 64))
    late = await store.accept(NewJob(new_job_id(), OWNER, resolved(), options=options))

    assert (early.cached_from, answered, late.cached_from) == (leader.id, 0, None)


Finish = Callable[[JobStore, Claim], Awaitable[Job]]


@pytest.mark.parametrize(
    "finish",
    [
        lambda store, claim: store.leases.complete(claim, [ARTIFACT], 1.0),
        lambda store, claim: store.leases.fail(claim, BROKEN),
        lambda store, claim: store.leases.cancelled(claim),
        lambda store, claim: store.leases.requeue(claim, BROKEN),
    ],
    ids=["complete", "fail", "cancelled", "requeue"],
)
async def test_a_follower_takes_the_place_of_a_running_leader_that_is_cancelled(
    store: JobStore, finish: Finish
) -> None:
    leader, follower = await leader_and_follower(store)
    claim = await claimed(store)
    await store.cancel(leader.id)

    ended = await finish(store, claim)
    promoted = await claimed(store)

    assert (ended.id, ended.state) == (leader.id, JobState.cancelled)
    assert (promoted.job.id, promoted.job.leader) == (follower.id, None)


@pytest.mark.parametrize("fails_followers", [True, False])
@pytest.mark.parametrize("counted_out", [True, False])
async def test_a_leader_that_fails_alone_leaves_its_place_to_a_follower(
    store: JobStore, settings: Settings, fails_followers: bool, counted_out: bool
) -> None:
    leader, follower = await leader_and_follower(store)
    error = JobError("internal", "broken")
    for _ in range(settings.max_attempts - 1 if counted_out else 0):
        await store.leases.requeue(await claimed(store), error)
    finish = store.leases.requeue if counted_out else store.leases.fail

    failed = await finish(await claimed(store), error, fails_followers=fails_followers)
    after = await store.get(follower.id)

    assert (failed.id, failed.state) == (leader.id, JobState.failed)
    assert after.state is (JobState.failed if fails_followers else JobState.queued)
    assert after.leader == (leader.id if fails_followers else None)
