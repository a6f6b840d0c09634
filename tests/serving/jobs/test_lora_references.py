"""The LoRAs that unfinished jobs need."""

from __future__ import annotations

from redis.asyncio import Redis

from deployments.protocol.request import Lora
from serve_app.job_ids import new_job_id
from serve_app.jobs.job import NewJob
from serve_app.jobs.store.lora_references import referenced_loras
from serve_app.jobs.store.store import JobStore
from serve_app.settings import Settings
from tests.serving.conftest import MakeSettings
from tests.serving.fakes import MODEL, OWNER, resolved


async def accept_with_loras(store: JobStore, *loras: str) -> str:
    request = resolved().model_copy(update={"loras": tuple(Lora(id=digest * 64) for digest in loras)})
    return (await store.accept(NewJob(new_job_id(), OWNER, request))).id


async def test_waiting_and_running_jobs_need_their_loras(
    store: JobStore, redis: Redis, settings: Settings
) -> None:
    for loras in ("a", "bc", "d", "e", "", "f"):
        await accept_with_loras(store, *loras)
    for _ in range(3):
        await store.leases.claim({MODEL: 1})

    needed = await referenced_loras(redis, settings.redis_prefix)

    assert needed == {digest * 64 for digest in "abcdef"}


async def test_ended_jobs_need_no_loras(store: JobStore, redis: Redis, settings: Settings) -> None:
    completed, cancelled = await accept_with_loras(store, "a"), await accept_with_loras(store, "b")
    claim = await store.leases.claim({MODEL: 1})
    assert claim is not None
    assert claim.job.id == completed
    await store.leases.complete(claim, [], 1.0)
    await store.cancel(cancelled)

    assert await referenced_loras(redis, settings.redis_prefix) == set()


async def test_a_job_whose_record_is_lost_needs_no_loras(
    store: JobStore, redis: Redis, settings: Settings
) -> None:
    lost = await accept_with_loras(store, "a")
    await accept_with_loras(store, "b")
    await redis.delete(f"{settings.redis_prefix}job:{lost}")

    assert await referenced_loras(redis, settings.redis_prefix) == {"b" * 64}


async def test_jobs_of_another_installation_are_not_counted(
    store: JobStore, redis: Redis, make_settings: MakeSettings
) -> None:
    await accept_with_loras(store, "a")

    other = make_settings().redis_prefix + "other:"

    assert await referenced_loras(redis, other) == set()
