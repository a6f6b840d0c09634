"""Pictures a day: never more than allowed, never counted twice, given back when none were made."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from deployments.protocol.errors import QuotaExceeded
from deployments.protocol.request import ResolvedRequest
from serve_app.admission.quota import DAY_S, Charge, day_of, old_days, refund, reserve
from serve_app.job_ids import new_job_id
from serve_app.jobs.job import Job, JobError, JobState, NewJob, StoredArtifact, SubmitOptions
from serve_app.jobs.store.key_names import Keys
from serve_app.jobs.store.leases import Claim
from serve_app.jobs.store.store import JobStore
from serve_app.settings import Settings
from tests.serving.fakes import MODEL, OWNER, resolved

NOON_US = 1_795_262_400_000_000  # 2026-11-21 12:00 UTC
ARTIFACT = StoredArtifact(0, "image", "outputs/x/1-0.png", "image/png", 3, "abc", 64, 64, 7)


def request_for(images: int = 1) -> ResolvedRequest:
    return resolved().model_copy(update={"num_images": images})


async def submitted(store: JobStore, images: int = 1, per_day: int = 4) -> Job:
    return await store.accept(
        NewJob(new_job_id(), OWNER, request_for(images), options=SubmitOptions(images_per_day=per_day))
    )


async def claimed(store: JobStore) -> Claim:
    claim = await store.leases.claim({MODEL: 1})
    assert claim is not None
    return claim


async def used(redis: Redis, settings: Settings) -> int:
    counts = await redis.hgetall(Keys(settings.redis_prefix).quota(OWNER))
    return sum(int(count) for count in counts.values())


def test_a_refusal_says_what_is_left_and_when_the_next_day_begins() -> None:
    with pytest.raises(QuotaExceeded, match="2 left of your 5") as refusal:
        reserve(5, {day_of(NOON_US): "3"}, 3, NOON_US)

    assert refusal.value.retry_after_s == DAY_S / 2
    assert reserve(5, {day_of(NOON_US): "3"}, 2, NOON_US) == Charge("2026-11-21", 2)
    assert reserve(5, {"2026-11-20": "5"}, 5, NOON_US) == Charge("2026-11-21", 5)
    assert reserve(None, {}, 1000, NOON_US) is None


@given(st.integers(0, 16), st.integers(0, 20))
def test_a_refund_is_never_more_than_was_reserved_nor_below_nothing(images: int, delivered: int) -> None:
    charge = Charge("2026-11-21", images)

    assert 0 <= refund(charge, delivered) <= images
    assert Charge.parse(str(charge)) == charge


def test_only_days_that_nothing_can_end_in_are_forgotten() -> None:
    assert old_days({"2026-11-21": "1", "2026-11-14": "1", "2026-10-01": "1"}, NOON_US) == ["2026-10-01"]


async def test_of_many_submits_at_once_just_the_allowed_number_gets_in(
    redis: Redis, settings: Settings, valkey_url: str
) -> None:
    replicas = [JobStore(redis, settings) for _ in range(4)]

    outcomes = await asyncio.gather(
        *(submitted(replicas[n % 4], per_day=5) for n in range(12)), return_exceptions=True
    )

    assert sum(isinstance(outcome, Job) for outcome in outcomes) == 5
    assert sum(isinstance(outcome, QuotaExceeded) for outcome in outcomes) == 7
    assert await used(redis, settings) == 5


async def test_the_same_job_accepted_twice_is_counted_once(
    store: JobStore, redis: Redis, settings: Settings
) -> None:
    job = await submitted(store, images=2)

    await store.accept(NewJob(job.id, OWNER, request_for(2), options=SubmitOptions(images_per_day=4)))

    assert await used(redis, settings) == 2


async def test_a_cancelled_job_gives_everything_back_once(
    store: JobStore, redis: Redis, settings: Settings
) -> None:
    job = await submitted(store, images=3)

    await store.cancel(job.id)
    await store.cancel(job.id)

    assert await used(redis, settings) == 0


async def test_a_failed_job_gives_everything_back_and_a_completed_one_what_it_did_not_make(
    store: JobStore, redis: Redis, settings: Settings
) -> None:
    await submitted(store, images=2)
    await store.leases.fail(await claimed(store), JobError("internal", "broken"))
    after_failure = await used(redis, settings)
    await submitted(store, images=3)
    claim = await claimed(store)

    done = await store.leases.complete(claim, [ARTIFACT, replace(ARTIFACT, kind="thumbnail")], 1.0)
    await store.leases.complete(claim, [ARTIFACT], 1.0)  # its answer was lost and it asked again

    assert after_failure == 0
    assert done.state is JobState.completed
    assert await used(redis, settings) == 1


async def test_a_job_whose_workers_all_die_gives_its_pictures_back_once(
    store: JobStore, redis: Redis, settings: Settings
) -> None:
    job = await submitted(store, images=2)
    keys = Keys(settings.redis_prefix)
    while_it_ran = []
    for _ in range(settings.max_attempts):
        await claimed(store)
        while_it_ran.append(await used(redis, settings))
        await redis.hset(keys.job(job.id), "lease_us", "1")
        await redis.zadd(keys.running, {job.id: 1})
        await store.leases.reap()

    assert while_it_ran == [2] * settings.max_attempts
    assert (await store.get(job.id)).state is JobState.failed
    assert await used(redis, settings) == 0
    assert await redis.ttl(keys.quota(OWNER)) > 0
