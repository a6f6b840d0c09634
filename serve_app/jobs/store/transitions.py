"""Every change of a job's state as the writes of one MULTI/EXEC: hash, indexes, event and hint together.

Nothing here reads or decides; that the indexes always agree with the hash is settled in this room.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from redis.asyncio.client import Pipeline
from redis.typing import EncodableT, FieldT

from deployments.protocol.request import ResolvedRequest
from deployments.validation.resolve import Adjustment
from serve_app.admission import quota
from serve_app.admission.quota import Charge
from serve_app.jobs import events as job_events
from serve_app.jobs.job import Job, JobError, JobState, ResumePoint, SubmitOptions
from serve_app.jobs.store.fair_queue import QueueTag
from serve_app.jobs.store.record import (
    ARTIFACTS,
    ERROR,
    IDEMPOTENCY_RECORD,
    RESUME_POINT,
    IdempotencyRecord,
    Keys,
    job_from,
    new_fields,
)
from serve_app.settings import Settings

NEW_WORK = "new"  # the hint that is no job id
EVENTS_TTL_S = 600  # an ended job's events; its hash tells the ending long after


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a new job goes."""

    queue_score: QueueTag
    now: float  # the turn that runs
    position: int  # 1: next to be claimed
    first: bool = False  # nobody else waits for the model
    leader: str | None = None  # an identical job in progress: this one waits for it, in no queue
    cached_from: str | None = None  # an identical job that has completed: this one copies its files


@dataclass(frozen=True, slots=True)
class CoalescedGroup:
    """What an ending job means to others."""

    is_leader: bool = False  # it is the one whose files answer its cache key
    followers: tuple[Job, ...] = ()  # identical jobs that wait for it, the oldest first


NO_GROUP = CoalescedGroup()


def flow_field(owner: str, priority: str) -> str:
    """The field of a `turns` hash that tells what an owner's jobs of one priority used up."""
    return f"{priority}:{owner}"


def digest(text: str) -> str:
    """Short and safe in the name of a key, whatever a caller wrote."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Transitions:
    """Queues writes on a pipe after `begin`. Times are the server's, in microseconds."""

    def __init__(self, keys: Keys, settings: Settings) -> None:
        self._keys = keys
        self._settings = settings
        self._lease_us = int(settings.lease_s * 1e6)

    def accept(
        self,
        pipe: Pipeline,
        job_id: str,
        owner: str,
        request: ResolvedRequest,
        warnings: tuple[Adjustment, ...],
        now_us: int,
        *,
        options: SubmitOptions,
        placement: Placement,
        charge: Charge | None = None,
    ) -> Job:
        """Nothing -> queued. charge: what it takes from its owner's quota."""
        fields = new_fields(
            owner,
            request,
            warnings,
            now_us,
            options=options,
            queue_score=placement.queue_score.score,
            leader=placement.leader,
            cached_from=placement.cached_from,
        )
        if charge is not None:
            fields["charge"] = str(charge)
            self._count(pipe, owner, charge.day, charge.images)
        job = job_from(job_id, fields)
        pipe.hset(self._keys.job(job_id), mapping=_pairs(fields))
        if options.idempotency_key is not None:
            first = IDEMPOTENCY_RECORD.dump_json(
                IdempotencyRecord.of(job_id, options.idempotency_key)
            ).decode()
            pipe.set(
                self._keys.idempotency_key(owner, digest(options.idempotency_key.key)),
                first,
                ex=self._settings.once_ttl_s,
            )
        if job.cache_key is not None and job.leader is None and job.cached_from is None:
            pipe.set(self._keys.cache_key(job.cache_key), job_id)
        if job.leader is None and job.cached_from is None:
            self._update_flow(pipe, job, placement)
        pipe.sadd(self._keys.active(owner), job_id)
        pipe.zadd(self._keys.owner(owner), {job_id: now_us})
        self._trim_owner(pipe, owner, now_us)
        if job.leader is None:
            self._enqueue(pipe, job)
        else:
            pipe.zadd(self._keys.followers(job.leader), {job_id: now_us})
        self._publish(pipe, job_id, job_events.JobQueued(placement.position))
        return job

    def claim(self, pipe: Pipeline, job: Job, now_us: int, queue_score: float) -> Job:
        """queued -> processing, under the next attempt number. turn: that runs now in its queue."""
        if job.cached_from is None:
            pipe.hset(self._keys.fair_queue(job.request.model), "v", repr(queue_score))
            pipe.expire(self._keys.fair_queue(job.request.model), self._settings.record_ttl_s)
        job = replace(
            job,
            state=JobState.processing,
            attempt=job.attempt + 1,
            started_at=now_us / 1e6,
            step=0 if job.resume_point is None else job.resume_point.step,
            steps=0 if job.resume_point is None else job.resume_point.steps,
        )
        begun = {
            "state": job.state.value,
            "attempt": str(job.attempt),
            "started_us": str(now_us),
            "step": str(job.step),
            "steps": str(job.steps),
        }
        pipe.hset(self._keys.job(job.id), mapping=_pairs(begun))
        self.dequeue(pipe, job.id, job.queue)
        self._lease(pipe, job.id, now_us)
        self._publish(pipe, job.id, job_events.JobStarted(job.attempt, job.step, job.steps))
        return job

    def renew(
        self,
        pipe: Pipeline,
        job: Job,
        now_us: int,
        *,
        step: int,
        steps: int,
        pending_events: Sequence[job_events.Event],
    ) -> None:
        """processing, for another lease; progress never goes back within an attempt."""
        if step > job.step or steps > job.steps:
            further = {"step": str(max(step, job.step)), "steps": str(max(steps, job.steps))}
            pipe.hset(self._keys.job(job.id), mapping=_pairs(further))
        self._lease(pipe, job.id, now_us)
        if pending_events:
            self._publish(pipe, job.id, *pending_events)

    def request_cancel(self, pipe: Pipeline, job: Job) -> Job:
        """processing, and its dispatcher knows at once that it shall stop."""
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
        """processing -> queued at its old place; failed for `error` at max_attempts, or cancelled.

        A job that was to copy files now waits for its model: the files may be what failed it.

        handover: what the next attempt goes on from. After a counted failure it begins anew, whatever
        was handed over before: that may have been the cause.
        """
        if job.cancel_requested:
            return self.end(pipe, job, JobState.cancelled, now_us, group)
        kept = resume_point or (None if counted else job.resume_point)
        step, steps = (0, 0) if kept is None else (kept.step, kept.steps)
        job = replace(
            job, failures=job.failures + counted, resume_point=kept, step=step, steps=steps, cached_from=None
        )
        pipe.hset(self._keys.job(job.id), "failures", str(job.failures))
        if job.failures >= self._settings.max_attempts:
            return self.end(
                pipe,
                replace(job, error=error),
                JobState.failed,
                now_us,
                group,
                fails_followers=fails_followers,
            )
        waiting = {"state": JobState.queued.value, "step": str(step), "steps": str(steps)}
        if kept is None:
            pipe.hdel(self._keys.job(job.id), "resume_point")
        else:
            waiting["resume_point"] = RESUME_POINT.dump_json(kept).decode()
        pipe.hset(self._keys.job(job.id), mapping=_pairs(waiting))
        pipe.hdel(self._keys.job(job.id), "lease_us", "cached_from")
        pipe.zrem(self._keys.running, job.id)
        self._enqueue(pipe, job)
        # its old place; followers see a truer one soon
        self._publish(pipe, job.id, job_events.JobQueued(1, step, steps))
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
        """The only way to an ended state: it tells the ending and gives every key a time to live.

        company: who waits for this job's files, all of them.  alike: they would fail as it did.
        """
        keys, ttl_s = self._keys, self._settings.record_ttl_s
        job = replace(job, state=state, completed_at=now_us / 1e6)
        fields = {"state": state.value, "ended_us": str(now_us)}
        if state is JobState.completed:
            fields["artifacts"] = ARTIFACTS.dump_json(job.artifacts).decode()
            fields["generation_s"] = str(job.generation_s)
        if state is JobState.failed and job.error is not None:
            fields["error"] = ERROR.dump_json(job.error).decode()
        pipe.hset(keys.job(job.id), mapping=_pairs(fields))
        pipe.hdel(keys.job(job.id), "lease_us")
        self.dequeue(pipe, job.id, job.queue)
        if job.leader is not None:
            pipe.zrem(keys.followers(job.leader), job.id)
        pipe.zrem(keys.running, job.id)
        pipe.srem(keys.active(job.owner), job.id)
        self._trim_owner(pipe, job.owner, now_us)
        self._publish(pipe, job.id, job_events.ending_event(job))
        pipe.expire(keys.job(job.id), ttl_s)
        pipe.expire(keys.events(job.id), min(ttl_s, EVENTS_TTL_S))
        back = quota.refund(job.charge, sum(artifact.kind != "thumbnail" for artifact in job.artifacts))
        if job.charge is not None and back:
            self._count(pipe, job.owner, job.charge.day, -back)
        pipe.zadd(keys.expiring, {job.id: now_us + self._settings.result_ttl_s * 1_000_000})
        pipe.expire(keys.expiring, 2 * max(ttl_s, self._settings.result_ttl_s))
        if job.webhook is not None:
            pipe.zadd(keys.outbox, {job.id: now_us})
            pipe.expire(keys.outbox, ttl_s)
        self._resolve_followers(pipe, job, now_us, group, fails_followers)
        return job

    def _count(self, pipe: Pipeline, owner: str, day: str, images: int) -> None:
        pipe.hincrby(self._keys.quota(owner), day, images)
        pipe.expire(self._keys.quota(owner), quota.KEPT_S)

    def _resolve_followers(
        self, pipe: Pipeline, job: Job, now_us: int, group: CoalescedGroup, fails_followers: bool
    ) -> None:
        """What the ending of a job means for the identical ones that wait for it.

        Completed: they copy its files. Failed, and they would be alike: so do they, for the same cause; a
        request that kills its workers must not do so once per follower. Otherwise, and when it was
        cancelled: the oldest of them takes its place.
        """
        keys, followers = self._keys, group.followers
        if followers:
            pipe.delete(keys.followers(job.id))
        if job.state is JobState.completed:
            for follower in followers:
                pipe.hset(keys.job(follower.id), "cached_from", job.id)
                pipe.hdel(keys.job(follower.id), "leader")
                self._enqueue(pipe, replace(follower, leader=None, cached_from=job.id))
            if group.is_leader and job.cache_key is not None:
                pipe.expire(keys.cache_key(job.cache_key), self._settings.result_ttl_s)
        elif job.state is JobState.failed and fails_followers:
            for follower in followers:
                failed = replace(follower, leader=None, error=job.error)
                self.end(pipe, failed, JobState.failed, now_us)
        elif followers:
            new_leader, *others = followers
            pipe.hdel(keys.job(new_leader.id), "leader")
            self._enqueue(pipe, replace(new_leader, leader=None))
            for other in others:
                pipe.hset(keys.job(other.id), "leader", new_leader.id)
                pipe.zadd(keys.followers(new_leader.id), {other.id: round(other.created_at * 1e6)})
            if group.is_leader and job.cache_key is not None:
                pipe.set(keys.cache_key(job.cache_key), new_leader.id)
            return
        if group.is_leader and job.cache_key is not None and job.state is not JobState.completed:
            pipe.delete(keys.cache_key(job.cache_key))

    def forget(self, pipe: Pipeline, job: Job, group: CoalescedGroup = NO_GROUP) -> None:
        """Ended -> nothing."""
        pipe.delete(self._keys.job(job.id), self._keys.events(job.id))
        if group.is_leader and job.cache_key is not None:
            pipe.delete(self._keys.cache_key(job.cache_key))
        pipe.zrem(self._keys.expiring, job.id)
        pipe.zrem(self._keys.outbox, job.id)
        pipe.zrem(self._keys.owner(job.owner), job.id)

    def files_expired(self, pipe: Pipeline, job: Job, group: CoalescedGroup) -> None:
        """Ended, and its files are about to be removed; the record stays for its own time."""
        pipe.hset(self._keys.job(job.id), "files_expired", "1")
        pipe.hdel(self._keys.job(job.id), "artifacts")
        if group.is_leader and job.cache_key is not None:
            pipe.delete(self._keys.cache_key(job.cache_key))

    def dequeue(self, pipe: Pipeline, job_id: str, queue: str) -> None:
        """Out of the queues; the state is the caller's business."""
        pipe.zrem(self._keys.pending, job_id)
        pipe.zrem(self._keys.pending_of(queue), job_id)

    def _update_flow(self, pipe: Pipeline, job: Job, placement: Placement) -> None:
        fair_queue = self._keys.fair_queue(job.request.model)
        if placement.first:  # nobody waits: what was used up before is forgiven, and forgotten
            pipe.delete(fair_queue)
            pipe.hset(fair_queue, "v", repr(placement.now))
        pipe.incr(self._keys.arrivals)
        pipe.expire(self._keys.arrivals, self._settings.record_ttl_s)
        pipe.hset(
            fair_queue, flow_field(job.owner, job.request.priority), repr(placement.queue_score.finish_tag)
        )
        pipe.expire(fair_queue, self._settings.record_ttl_s)

    def _enqueue(self, pipe: Pipeline, job: Job) -> None:
        accepted_us = round(job.created_at * 1e6)
        pipe.zadd(self._keys.pending, {job.id: accepted_us})
        pipe.zadd(self._keys.pending_of(job.queue), {job.id: job.queue_score})
        pipe.publish(self._keys.work_channel, NEW_WORK)

    def _lease(self, pipe: Pipeline, job_id: str, now_us: int) -> None:
        deadline_us = now_us + self._lease_us
        pipe.hset(self._keys.job(job_id), "lease_us", str(deadline_us))
        pipe.zadd(self._keys.running, {job_id: deadline_us})

    def _publish(self, pipe: Pipeline, job_id: str, *events: job_events.Event) -> None:
        for event in events:
            pipe.xadd(
                self._keys.events(job_id),
                _pairs(job_events.encode(event)),
                maxlen=self._settings.events_kept,
                approximate=False,
            )
        # inside MULTI, so that the hint leaves only after the write is on disk
        pipe.publish(self._keys.events_channel, job_id)

    def _trim_owner(self, pipe: Pipeline, owner: str, now_us: int) -> None:
        """Twice a record's life, renewed by every accept and ending: no list outlives its jobs for long."""
        kept_s = 2 * self._settings.record_ttl_s
        pipe.zremrangebyscore(self._keys.owner(owner), 0, now_us - kept_s * 1_000_000)
        pipe.expire(self._keys.owner(owner), kept_s)


def _pairs(fields: Mapping[str, str]) -> dict[FieldT, EncodableT]:
    """The same fields under redis-py's wider, invariant type."""
    return dict(fields.items())
