"""Every change of a job's state as the writes of one MULTI/EXEC: hash, indexes, event and wake-up together.

Nothing here reads or decides. That the indexes always agree with the hash is ensured here, and in endings.py
for the changes that end or remove a job.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from redis.asyncio.client import Pipeline

from serve_app.admission.quota import Charge
from serve_app.jobs import events
from serve_app.jobs.job import RESTARTED, Job, JobError, JobState, NewJob, ResumePoint, restarted
from serve_app.jobs.store.endings import NO_GROUP, CoalescedGroup, Endings
from serve_app.jobs.store.fair_queue import QueueTag, flow_of
from serve_app.jobs.store.indexes import Indexes, as_pairs
from serve_app.jobs.store.key_names import Keys, key_digest
from serve_app.jobs.store.record import (
    ADJUSTMENTS,
    IDEMPOTENCY_RECORD,
    RESUME_POINT,
    IdempotencyRecord,
    job_from,
    new_fields,
)
from serve_app.settings import Settings


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


class Transitions:
    """Queues writes on a pipe after `begin`. Times are microseconds of the server's clock."""

    def __init__(self, keys: Keys, settings: Settings) -> None:
        self._keys = keys
        self._settings = settings
        self._indexes = Indexes(keys, settings)
        self.endings = Endings(keys, settings, self._indexes)

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
                keys.idempotency_key(job.owner, key_digest(key.key)),
                first,
                ex=self._settings.idempotency_ttl_s,
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
        resume_point: ResumePoint | None = None,
        device_us: int = 0,
    ) -> None:
        """processing, for another lease; progress never goes back within an attempt.

        device_us: device microseconds of all attempts so far.
        """
        if step > job.step or steps > job.steps or device_us > job.device_us:
            further = {
                "step": str(max(step, job.step)),
                "steps": str(max(steps, job.steps)),
                "device_us": str(max(device_us, job.device_us)),
            }
            pipe.hset(self._keys.job(job.id), mapping=as_pairs(further))
        if resume_point is not None:
            pipe.hset(self._keys.job(job.id), "resume_point", RESUME_POINT.dump_json(resume_point).decode())
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

        resume_point: where the next attempt starts; None: where this one got to, or began. After a counted
        failure that counts only if this attempt has reached it: where it began may have been the cause.
        """
        if job.cancel_requested:
            return self.endings.end(pipe, job, JobState.cancelled, now_us, group)
        kept = resume_point or job.resume_point
        if resume_point is None and counted and kept is not None and kept.attempt != job.attempt:
            kept = None
        step, steps = (0, 0) if kept is None else (kept.step, kept.steps)
        warnings = job.warnings
        if job.step and kept is None:
            warnings = (
                *(warning for warning in warnings if warning.code != RESTARTED),
                restarted(job.step, job.steps, "what ran them was lost, and no state of them was kept"),
            )
        job = replace(
            job,
            failures=job.failures + counted,
            resume_point=kept,
            step=step,
            steps=steps,
            cached_from=None,
            warnings=warnings,
        )
        pipe.hset(self._keys.job(job.id), "failures", str(job.failures))
        if job.failures >= self._settings.max_attempts:
            failed = replace(job, error=error)
            return self.endings.end(
                pipe, failed, JobState.failed, now_us, group, fails_followers=fails_followers
            )
        return self._requeue(pipe, job)

    def _requeue(self, pipe: Pipeline, job: Job) -> Job:
        """Into its queue with its old score; without a lease, and with its resume point if it has one."""
        key = self._keys.job(job.id)
        fields = {
            "state": JobState.queued.value,
            "step": str(job.step),
            "steps": str(job.steps),
            "warnings": ADJUSTMENTS.dump_json(job.warnings).decode(),
            "device_us": str(job.device_us),
        }
        if job.resume_point is None:
            pipe.hdel(key, "resume_point")
        else:
            fields["resume_point"] = RESUME_POINT.dump_json(job.resume_point).decode()
        pipe.hset(key, mapping=as_pairs(fields))
        pipe.hdel(key, "cached_from")
        self._indexes.end_lease(pipe, job.id)
        self._indexes.enqueue(pipe, job)
        # position 1 is a guess; followers receive the real one when they next poll
        self._indexes.publish(pipe, job.id, events.JobQueued(1, job.step, job.steps))
        return replace(job, state=JobState.queued)

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
