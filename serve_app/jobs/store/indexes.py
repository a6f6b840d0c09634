"""The indexes, leases and event streams beside the job hashes, as writes on a pipe.

The functions read nothing and decide nothing; transitions.py combines them into whole changes of state.
"""

from __future__ import annotations

from collections.abc import Mapping

from redis.asyncio.client import Pipeline
from redis.typing import EncodableT, FieldT

from serve_app.admission import quota
from serve_app.jobs import events
from serve_app.jobs.job import Job
from serve_app.jobs.store.key_names import Keys
from serve_app.settings import Settings

NEW_WORK = "new"  # the wake-up on the work channel that is no job id


class Indexes:
    """Queues writes on a pipe after `begin`. Times are microseconds of the server's clock."""

    def __init__(self, keys: Keys, settings: Settings) -> None:
        self._keys = keys
        self._events_kept = settings.events_kept
        self._record_ttl_s = settings.record_ttl_s
        self._lease_us = int(settings.lease_s * 1e6)

    def enqueue(self, pipe: Pipeline, job: Job) -> None:
        """Into its queue, at the position its score gives it, and wake the dispatchers."""
        pipe.zadd(self._keys.pending, {job.id: round(job.created_at * 1e6)})
        pipe.zadd(self._keys.pending_of(job.queue), {job.id: job.queue_score})
        pipe.publish(self._keys.work_channel, NEW_WORK)

    def dequeue(self, pipe: Pipeline, job_id: str, queue: str) -> None:
        """Out of the queues."""
        pipe.zrem(self._keys.pending, job_id)
        pipe.zrem(self._keys.pending_of(queue), job_id)

    def lease(self, pipe: Pipeline, job_id: str, now_us: int) -> None:
        """Give the job a lease from now on, or renew it."""
        deadline_us = now_us + self._lease_us
        pipe.hset(self._keys.job(job_id), "lease_us", str(deadline_us))
        pipe.zadd(self._keys.running, {job_id: deadline_us})

    def end_lease(self, pipe: Pipeline, job_id: str) -> None:
        """The job is not running any more."""
        pipe.hdel(self._keys.job(job_id), "lease_us")
        pipe.zrem(self._keys.running, job_id)

    def publish(self, pipe: Pipeline, job_id: str, *published: events.Event) -> None:
        """Append events to the job's stream and wake its followers."""
        for event in published:
            pipe.xadd(
                self._keys.events(job_id),
                as_pairs(events.encode(event)),
                maxlen=self._events_kept,
                approximate=False,
            )
        # inside MULTI: the wake-up leaves only after the write is on disk
        pipe.publish(self._keys.events_channel, job_id)

    def charge(self, pipe: Pipeline, owner: str, day: str, images: int) -> None:
        """Add to what an owner has used of the day's quota; negative to give back."""
        pipe.hincrby(self._keys.quota(owner), day, images)
        pipe.expire(self._keys.quota(owner), quota.KEPT_S)

    def trim_owner(self, pipe: Pipeline, owner: str, now_us: int) -> None:
        """Drop old entries of an owner's list, which expires two record lifetimes after its last change."""
        kept_s = 2 * self._record_ttl_s
        pipe.zremrangebyscore(self._keys.owner(owner), 0, now_us - kept_s * 1_000_000)
        pipe.expire(self._keys.owner(owner), kept_s)


def as_pairs(fields: Mapping[str, str]) -> dict[FieldT, EncodableT]:
    """The same fields under redis-py's wider, invariant type."""
    return dict(fields.items())
