"""Following a job from any process: the events so far, then new ones as they come, until the ending."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from serve_app.jobs import events
from serve_app.jobs.job import Job, JobState
from serve_app.jobs.store.store import FROM_START, JobStore
from serve_app.jobs.store.wakeups import Wakeups, wait_for_wakeup
from serve_app.redis.transactions import StoreUnreachable

POLL_S = 1.0  # wake-ups may be lost, and queue positions change without any
OUTAGE_LIMIT_S = 15.0  # a restart of the store goes unnoticed; a longer outage is an error
OUTAGE_POLL_S = 0.1

StreamEntry = tuple[str, events.Event]  # (event id, event); following again after the id misses nothing


async def follow(
    store: JobStore, wakeups: Wakeups, job_id: str, after: str = FROM_START
) -> AsyncGenerator[StreamEntry]:
    """Events after the one with id `after`; the last is always the ending.

    While the job waits, JobQueued comes again whenever its position changed, under the id before it.
    Raises NotFound, BadRequest for a malformed id, StoreUnreachable after a long outage.
    """
    position: int | None = None
    with wakeups.subscribe(job_id) as wakeup:
        await wakeups.ensure_subscribed()
        woken = False
        while True:
            # the job before its events: an ended job's stream is complete, or deleted
            job = None if woken else await get_with_retry(store, job_id)
            for event_id, event in await _events(store, job_id, after):
                after = event_id
                yield after, event
                if isinstance(event, events.ENDINGS):
                    return
                if isinstance(event, events.JobQueued):
                    position = event.position
            if job is not None and job.state.ended:
                yield after, events.ending_event(job)
                return
            if job is not None and job.state is JobState.queued:
                new_position = await _position(store, job)
                if new_position not in (None, position):
                    position = new_position
                    yield after, events.JobQueued(new_position, job.step, job.steps)
            woken = await wait_for_wakeup(wakeup, POLL_S)


async def wait(store: JobStore, wakeups: Wakeups, job_id: str, timeout_s: float) -> Job:
    """The job when it has ended, or as it is after timeout_s."""
    deadline = time.monotonic() + timeout_s
    with wakeups.subscribe(job_id) as wakeup:
        await wakeups.ensure_subscribed()
        while True:
            job = await get_with_retry(store, job_id)
            left_s = deadline - time.monotonic()
            if job.state.ended or left_s <= 0:
                return job
            await wait_for_wakeup(wakeup, min(POLL_S, left_s))


async def get_with_retry(store: JobStore, job_id: str) -> Job:
    """The job, though the store may be unreachable for up to OUTAGE_LIMIT_S. Raises NotFound."""
    deadline = time.monotonic() + OUTAGE_LIMIT_S
    while True:
        try:
            return await store.get(job_id)
        except StoreUnreachable:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(OUTAGE_POLL_S)


# get_with_retry decides how long an outage is tolerated


async def _events(store: JobStore, job_id: str, after: str) -> list[StreamEntry]:
    try:
        return await store.events(job_id, after)
    except StoreUnreachable:
        return []


async def _position(store: JobStore, job: Job) -> int | None:
    try:
        return await store.position(job)
    except StoreUnreachable:
        return None
