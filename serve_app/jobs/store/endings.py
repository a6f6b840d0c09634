"""The end of a job, and what it means for the identical jobs that wait for its files.

Writes of one MULTI/EXEC, like those of transitions.py; nothing here reads or decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from redis.asyncio.client import Pipeline

from serve_app.admission import quota
from serve_app.jobs import events
from serve_app.jobs.job import Job, JobState
from serve_app.jobs.store.indexes import Indexes, as_pairs
from serve_app.jobs.store.key_names import Keys
from serve_app.jobs.store.record import ADJUSTMENTS, ARTIFACTS, ERROR
from serve_app.jobs.store.usage_totals import count_usage
from serve_app.settings import Settings

EVENTS_TTL_S = 600  # an ended job's stream; its hash gives the ending for much longer


@dataclass(frozen=True, slots=True)
class CoalescedGroup:
    """The jobs that depend on one job's files."""

    is_leader: bool = False  # the files of this job answer its cache key
    followers: tuple[Job, ...] = ()  # identical jobs that wait for it, oldest first


NO_GROUP = CoalescedGroup()


class Endings:
    """Queues writes on a pipe after `begin`. Times are microseconds of the server's clock."""

    def __init__(self, keys: Keys, settings: Settings, indexes: Indexes) -> None:
        self._keys = keys
        self._settings = settings
        self._indexes = indexes

    def end(
        self,
        pipe: Pipeline,
        job: Job,
        state: JobState,
        now_us: int,
        group: CoalescedGroup = NO_GROUP,
        *,
        fails_followers: bool = True,
    ) -> Job:
        """The only way to an ended state: it publishes the ending and gives every key a time to live.

        group: all jobs that wait for this one's files.  fails_followers: a failure is theirs as well.
        """
        keys, ttl_s = self._keys, self._settings.record_ttl_s
        job = replace(job, state=state, completed_at=now_us / 1e6)
        fields = {"state": state.value, "ended_us": str(now_us), "device_us": str(job.device_us)}
        if state is JobState.completed:
            fields["artifacts"] = ARTIFACTS.dump_json(job.artifacts).decode()
            fields["generation_s"] = str(job.generation_s)
            fields["warnings"] = ADJUSTMENTS.dump_json(job.warnings).decode()
        if state is JobState.failed and job.error is not None:
            fields["error"] = ERROR.dump_json(job.error).decode()
        pipe.hset(keys.job(job.id), mapping=as_pairs(fields))
        self._indexes.end_lease(pipe, job.id)
        self._indexes.dequeue(pipe, job.id, job.queue)
        if job.leader is not None:
            pipe.zrem(keys.followers(job.leader), job.id)
        pipe.srem(keys.active(job.owner), job.id)
        self._indexes.trim_owner(pipe, job.owner, now_us)
        self._indexes.publish(pipe, job.id, events.ending_event(job))
        pipe.expire(keys.job(job.id), ttl_s)
        pipe.expire(keys.events(job.id), min(ttl_s, EVENTS_TTL_S))
        self._refund(pipe, job)
        count_usage(pipe, keys, job, now_us, self._settings.usage_kept_days)
        pipe.zadd(keys.expiring, {job.id: now_us + self._settings.result_ttl_s * 1_000_000})
        pipe.expire(keys.expiring, 2 * max(ttl_s, self._settings.result_ttl_s))
        if job.webhook is not None:
            pipe.zadd(keys.outbox, {job.id: now_us})
            pipe.expire(keys.outbox, ttl_s)
        self._resolve_followers(pipe, job, now_us, group, fails_followers=fails_followers)
        return job

    def _refund(self, pipe: Pipeline, job: Job) -> None:
        """Give back the part of the job's charge that it has not delivered."""
        delivered = sum(artifact.kind != "thumbnail" for artifact in job.artifacts)
        images = quota.refund(job.charge, delivered)
        if job.charge is not None and images:
            self._indexes.charge(pipe, job.owner, job.charge.day, -images)

    def _resolve_followers(
        self, pipe: Pipeline, job: Job, now_us: int, group: CoalescedGroup, *, fails_followers: bool
    ) -> None:
        """What the ending of a job means for the identical jobs that wait for it, and for its cache key.

        Completed: they copy its files. Failed, and the failure is theirs as well: they fail for the same
        cause, as a request that kills its workers must not do so once per follower. Otherwise, and when it
        was cancelled: the oldest of them becomes the new leader and takes over the cache key.
        """
        keys, followers = self._keys, group.followers
        if followers:
            pipe.delete(keys.followers(job.id))
        if job.state is JobState.completed:
            for follower in followers:
                pipe.hset(keys.job(follower.id), "cached_from", job.id)
                pipe.hdel(keys.job(follower.id), "leader")
                self._indexes.enqueue(pipe, replace(follower, leader=None, cached_from=job.id))
            if group.is_leader and job.cache_key is not None:
                pipe.expire(keys.cache_key(job.cache_key), self._settings.result_ttl_s)
        elif job.state is JobState.failed and fails_followers:
            for follower in followers:
                failed = replace(follower, leader=None, error=job.error)
                self.end(pipe, failed, JobState.failed, now_us)
            self._release_cache_key(pipe, job, group)
        elif followers:
            self._promote_follower(pipe, job, group)
        else:
            self._release_cache_key(pipe, job, group)

    def _promote_follower(self, pipe: Pipeline, job: Job, group: CoalescedGroup) -> None:
        """The oldest follower runs in the job's place, and the others wait for it from now on."""
        keys = self._keys
        new_leader, *others = group.followers
        pipe.hdel(keys.job(new_leader.id), "leader")
        self._indexes.enqueue(pipe, replace(new_leader, leader=None))
        for other in others:
            pipe.hset(keys.job(other.id), "leader", new_leader.id)
            pipe.zadd(keys.followers(new_leader.id), {other.id: round(other.created_at * 1e6)})
        if group.is_leader and job.cache_key is not None:
            pipe.set(keys.cache_key(job.cache_key), new_leader.id)

    def _release_cache_key(self, pipe: Pipeline, job: Job, group: CoalescedGroup) -> None:
        """From now on no request is answered by this job's files."""
        if group.is_leader and job.cache_key is not None:
            pipe.delete(self._keys.cache_key(job.cache_key))

    def delete(self, pipe: Pipeline, job: Job, group: CoalescedGroup = NO_GROUP) -> None:
        """Ended -> nothing."""
        pipe.delete(self._keys.job(job.id), self._keys.events(job.id))
        self._release_cache_key(pipe, job, group)
        pipe.zrem(self._keys.expiring, job.id)
        pipe.zrem(self._keys.outbox, job.id)
        pipe.zrem(self._keys.owner(job.owner), job.id)

    def expire_files(self, pipe: Pipeline, job: Job, group: CoalescedGroup) -> None:
        """Ended, with its files about to be removed; the record stays for its own time."""
        pipe.hset(self._keys.job(job.id), "files_expired", "1")
        pipe.hdel(self._keys.job(job.id), "artifacts")
        self._release_cache_key(pipe, job, group)
