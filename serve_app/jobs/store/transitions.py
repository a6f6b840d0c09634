"""Every change of a job's state as the writes of one MULTI/EXEC: hash, indexes, event and wake-up together.

Nothing here reads or decides. That the indexes always agree with the hash is ensured in this module alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from redis.asyncio.client import Pipeline

from serve_app.admission import quota
from serve_app.admission.quota import Charge
from serve_app.jobs import events
from serve_app.jobs.job import Job, JobError, JobState, NewJob, ResumePoint
from serve_app.jobs.store.fair_queue import QueueTag, flow_of
from serve_app.jobs.store.indexes import Indexes, as_pairs
from serve_app.jobs.store.key_names import Keys, key_digest
from serve_app.jobs.store.record import (
    ARTIFACTS,
    ERROR,
    IDEMPOTENCY_RECORD,
    RESUME_POINT,
    IdempotencyRecord,
    job_from,
    new_fields,
)
from serve_app.settings import Settings

EVENTS_TTL_S = 600  # an ended job's stream; its hash gives the ending for much longer


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a new job goes: its model's queue, the queue of copies, or behind its leader."""

    tag: QueueTag
    virtual_time: float  # of its model's queue
    position: int  # 1: next to be claimed
    queue_is_empty: bool = False
    leader: str | None = None  # an identical job in progress: this one waits for it, in no queue
    cached_from: str | None = None  # an identical completed job: this one copies its files

    @property
    def needs_model(self) -> bool:
        """Whether the job has to run, because no identical job provides its files."""
        return self.leader is None and self.cached_from is None


@dataclass(frozen=True, slots=True)
class CoalescedGroup:
    """The jobs that depend on one job's files."""

    is_leader: bool = False  # the files of this job answer its cache key
    followers: tuple[Job, ...] = ()  # identical jobs that wait for it, oldest first


NO_GROUP = CoalescedGroup()


class Transitions:
    """Queues writes on a pipe after `begin`. Times are microseconds of the server's clock."""

    def __init__(self, keys: Keys, settings: Settings) -> None:
        self._keys = keys
        self._settings = settings
        self._indexes = Indexes(keys, settings)

    def accept(
        self, pipe: Pipeline, new: NewJob, now_us: int, placement: Placement, charge: Charge | None = None
    ) -> Job:
        """Nothing -> queued. charge: what it takes from its owner's quota."""
        keys, key = self._keys, new.options.idempotency_key
        fields = new_fields(
            new,
            now_us,
            queue_score=placement.tag.score,
            leader=placement.leader,
            cached_from=placement.cached_from,
        )
        if charge is not None:
            fields["charge"] = str(charge)
            self._indexes.charge(pipe, new.owner, charge.day, charge.images)
        job = job_from(new.id, fields)
        pipe.hset(keys.job(job.id), mapping=as_pairs(fields))
        if key is not None:
            first = IDEMPOTENCY_RECORD.dump_json(IdempotencyRecord.of(job.id, key)).decode()
            pipe.set(
                keys.idempotency_key(job.owner, key_digest(key.key)), first, ex=self._settings.once_ttl_s
            )
        if placement.needs_model:
            if job.cache_key is not None:
                pipe.set(keys.cache_key(job.cache_key), job.id)
            self._advance_flow(pipe, job, placement)
        pipe.sadd(keys.active(job.owner), job.id)
        pipe.zadd(keys.owner(job.owner), {job.id: now_us})
        self._indexes.trim_owner(pipe, job.owner, now_us)
        if job.leader is None:
            self._indexes.enqueue(pipe, job)
        else:
            pipe.zadd(keys.followers(job.leader), {job.id: now_us})
        self._indexes.publish(pipe, job.id, events.JobQueued(placement.position))
        return job

    def claim(self, pipe: Pipeline, job: Job, now_us: int, virtual_time: float) -> Job:
        """queued -> processing, under the next attempt number. virtual_time: of its queue from now on."""
        keys = self._keys
        if job.cached_from is None:
            pipe.hset(keys.fair_queue(job.request.model), "v", repr(virtual_time))
            pipe.expire(keys.fair_queue(job.request.model), self._settings.record_ttl_s)
        job = replace(
            job,
            state=JobState.processing,
            attempt=job.attempt + 1,
            started_at=now_us / 1e6,
            step=0 if job.resume_point is None else job.resume_point.step,
            steps=0 if job.resume_point is None else job.resume_point.steps,
        )
        fields = {
            "state": job.state.value,
            "attempt": str(job.attempt),
            "started_us": str(now_us),
            "step": str(job.step),
            "steps": str(job.steps),
        }
        pipe.hset(keys.job(job.id), mapping=as_pairs(fields))
        self._indexes.dequeue(pipe, job.id, job.queue)
        self._indexes.lease(pipe, job.id, now_us)
        self._indexes.publish(pipe, job.id, events.JobStarted(job.attempt, job.step, job.steps))
        return job

    def drop_from_queue(self, pipe: Pipeline, job_id: str, queue: str) -> None:
        """Remove a queue entry whose job is not waiting there, so that it is not read again."""
        self._indexes.dequeue(pipe, job_id, queue)

    def renew(
        self,
        pipe: Pipeline,
        job: Job,
        now_us: int,
        *,
        step: int,
        steps: int,
        pending_events: Sequence[events.Event],
    ) -> None:
        """processing, for another lease; progress never goes back within an attempt."""
        if step > job.step or steps > job.steps:
            further = {"step": str(max(step, job.step)), "steps": str(max(steps, job.steps))}
            pipe.hset(self._keys.job(job.id), mapping=as_pairs(further))
        self._indexes.lease(pipe, job.id, now_us)
        if pending_events:
            self._indexes.publish(pipe, job.id, *pending_events)

    def request_cancel(self, pipe: Pipeline, job: Job) -> Job:
        """processing, marked as to be cancelled; its worker is woken."""
        pipe.hset(self._keys.job(job.id), "cancel", "1")
        pipe.publish(self._keys.work_channel, job.id)
        return replace(job, cancel_requested=True)

    def release(
        self,
        pipe: Pipeline,
        job: Job,
        error: JobError,
        now_us: int,
        *,
        counted: bool,
        resume_point: ResumePoint | None = None,
        group: CoalescedGroup = NO_GROUP,
        fails_followers: bool = True,
    ) -> Job:
        """processing -> queued with its old score; failed for `error` at max_attempts, or cancelled.

        A job that was to copy files waits for its model from now on: the files may have caused the failure.

        resume_point: where the next attempt starts. After a counted failure it starts from the beginning,
        whatever resume point there was before: that may have been the cause.
        """
        if job.cancel_requested:
            return self.end(pipe, job, JobState.cancelled, now_us, group)
        kept = resume_point or (None if counted else job.resume_point)
        step, steps = (0, 0) if kept is None else (kept.step, kept.steps)
        job = replace(
            job,
            failures=job.failures + counted,
            resume_point=kept,
            step=step,
            steps=steps,
            cached_from=None,
        )
        pipe.hset(self._keys.job(job.id), "failures", str(job.failures))
        if job.failures >= self._settings.max_attempts:
            failed = replace(job, error=error)
            return self.end(pipe, failed, JobState.failed, now_us, group, fails_followers=fails_followers)
        waiting = {"state": JobState.queued.value, "step": str(step), "steps": str(steps)}
        if kept is None:
            pipe.hdel(self._keys.job(job.id), "resume_point")
        else:
            waiting["resume_point"] = RESUME_POINT.dump_json(kept).decode()
        pipe.hset(self._keys.job(job.id), mapping=as_pairs(waiting))
        pipe.hdel(self._keys.job(job.id), "cached_from")
        self._indexes.end_lease(pipe, job.id)
        self._indexes.enqueue(pipe, job)
        # position 1 is a guess; followers receive the real one when they next poll
        self._indexes.publish(pipe, job.id, events.JobQueued(1, step, steps))
        return replace(job, state=JobState.queued)

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
        fields = {"state": state.value, "ended_us": str(now_us)}
        if state is JobState.completed:
            fields["artifacts"] = ARTIFACTS.dump_json(job.artifacts).decode()
            fields["generation_s"] = str(job.generation_s)
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

    def _advance_flow(self, pipe: Pipeline, job: Job, placement: Placement) -> None:
        """Store the finish tag of the job's flow; in an empty queue all earlier tags are dropped first."""
        fair_queue = self._keys.fair_queue(job.request.model)
        if placement.queue_is_empty:
            pipe.delete(fair_queue)
            pipe.hset(fair_queue, "v", repr(placement.virtual_time))
        pipe.incr(self._keys.arrivals)
        pipe.expire(self._keys.arrivals, self._settings.record_ttl_s)
        pipe.hset(fair_queue, flow_of(job.owner, job.request.priority), repr(placement.tag.finish_tag))
        pipe.expire(fair_queue, self._settings.record_ttl_s)
