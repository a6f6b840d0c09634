"""Every change of a job's state as the writes of one MULTI/EXEC: hash, indexes, event and hint together.

Nothing here reads or decides; that the indexes always agree with the hash is settled in this room.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from redis.asyncio.client import Pipeline
from redis.typing import EncodableT, FieldT

from deployments.protocol.limits import Correction
from deployments.protocol.request import FittedRequest
from serve_app.jobs import progress
from serve_app.jobs.job import Handover, Job, JobError, JobState
from serve_app.jobs.record import ARTIFACTS, ERROR, HANDOVER, Keys, job_from, new_fields
from serve_app.settings import Settings

NEW_WORK = "new"  # the hint that is no job id
EVENTS_TTL_S = 600  # an ended job's events; its hash tells the ending long after


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
        request: FittedRequest,
        warnings: tuple[Correction, ...],
        now_us: int,
        *,
        position: int,
    ) -> Job:
        """Nothing -> queued."""
        fields = new_fields(owner, request, warnings, now_us)
        job = job_from(job_id, fields)
        pipe.hset(self._keys.job(job_id), mapping=_pairs(fields))
        pipe.sadd(self._keys.active(owner), job_id)
        pipe.zadd(self._keys.owner(owner), {job_id: now_us})
        self._trim_owner(pipe, owner, now_us)
        self._enqueue(pipe, job)
        self._tell(pipe, job_id, progress.Queued(position))
        return job

    def claim(self, pipe: Pipeline, job: Job, now_us: int) -> Job:
        """queued -> processing, under the next attempt number."""
        job = replace(
            job,
            state=JobState.processing,
            attempt=job.attempt + 1,
            started_at=now_us / 1e6,
            step=0 if job.handover is None else job.handover.step,
            steps=0 if job.handover is None else job.handover.steps,
        )
        begun = {
            "state": job.state.value,
            "attempt": str(job.attempt),
            "started_us": str(now_us),
            "step": str(job.step),
            "steps": str(job.steps),
        }
        pipe.hset(self._keys.job(job.id), mapping=_pairs(begun))
        self.dequeue(pipe, job.id, job.request.model)
        self._lease(pipe, job.id, now_us)
        self._tell(pipe, job.id, progress.Started(job.attempt, job.step, job.steps))
        return job

    def renew(
        self,
        pipe: Pipeline,
        job: Job,
        now_us: int,
        *,
        step: int,
        steps: int,
        news: Sequence[progress.Event],
    ) -> None:
        """processing, for another lease; progress never goes back within an attempt."""
        if step > job.step or steps > job.steps:
            further = {"step": str(max(step, job.step)), "steps": str(max(steps, job.steps))}
            pipe.hset(self._keys.job(job.id), mapping=_pairs(further))
        self._lease(pipe, job.id, now_us)
        if news:
            self._tell(pipe, job.id, *news)

    def ask_to_cancel(self, pipe: Pipeline, job: Job) -> Job:
        """processing, and its dispatcher knows at once that it shall stop."""
        pipe.hset(self._keys.job(job.id), "cancel", "1")
        pipe.publish(self._keys.work_channel, job.id)
        return replace(job, cancel_requested=True)

    def give_back(
        self,
        pipe: Pipeline,
        job: Job,
        error: JobError,
        now_us: int,
        *,
        counted: bool,
        handover: Handover | None = None,
    ) -> Job:
        """processing -> queued at its old place; failed for `error` at max_attempts, or cancelled.

        handover: what the next attempt goes on from. After a counted failure it begins anew, whatever
        was handed over before: that may have been the cause.
        """
        if job.cancel_requested:
            return self.end(pipe, job, JobState.cancelled, now_us)
        kept = handover or (None if counted else job.handover)
        step, steps = (0, 0) if kept is None else (kept.step, kept.steps)
        job = replace(job, failures=job.failures + counted, handover=kept, step=step, steps=steps)
        pipe.hset(self._keys.job(job.id), "failures", str(job.failures))
        if job.failures >= self._settings.max_attempts:
            return self.end(pipe, replace(job, error=error), JobState.failed, now_us)
        waiting = {"state": JobState.queued.value, "step": str(step), "steps": str(steps)}
        if kept is None:
            pipe.hdel(self._keys.job(job.id), "handover")
        else:
            waiting["handover"] = HANDOVER.dump_json(kept).decode()
        pipe.hset(self._keys.job(job.id), mapping=_pairs(waiting))
        pipe.hdel(self._keys.job(job.id), "lease_us")
        pipe.zrem(self._keys.running, job.id)
        self._enqueue(pipe, job)
        # its old place; followers see a truer one soon
        self._tell(pipe, job.id, progress.Queued(1, step, steps))
        return replace(job, state=JobState.queued)

    def end(self, pipe: Pipeline, job: Job, state: JobState, now_us: int) -> Job:
        """The only way to an ended state: it tells the ending and gives every key a time to live."""
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
        self.dequeue(pipe, job.id, job.request.model)
        pipe.zrem(keys.running, job.id)
        pipe.srem(keys.active(job.owner), job.id)
        self._trim_owner(pipe, job.owner, now_us)
        self._tell(pipe, job.id, progress.ending(job))
        pipe.expire(keys.job(job.id), ttl_s)
        pipe.expire(keys.events(job.id), min(ttl_s, EVENTS_TTL_S))
        return job

    def forget(self, pipe: Pipeline, job: Job) -> None:
        """Ended -> nothing."""
        pipe.delete(self._keys.job(job.id), self._keys.events(job.id))
        pipe.zrem(self._keys.owner(job.owner), job.id)

    def dequeue(self, pipe: Pipeline, job_id: str, model: str) -> None:
        """Out of the queues; the state is the caller's business."""
        pipe.zrem(self._keys.pending, job_id)
        pipe.zrem(self._keys.pending_of(model), job_id)

    def _enqueue(self, pipe: Pipeline, job: Job) -> None:
        accepted_us = round(job.created_at * 1e6)
        pipe.zadd(self._keys.pending, {job.id: accepted_us})
        pipe.zadd(self._keys.pending_of(job.request.model), {job.id: accepted_us})
        pipe.publish(self._keys.work_channel, NEW_WORK)

    def _lease(self, pipe: Pipeline, job_id: str, now_us: int) -> None:
        deadline_us = now_us + self._lease_us
        pipe.hset(self._keys.job(job_id), "lease_us", str(deadline_us))
        pipe.zadd(self._keys.running, {job_id: deadline_us})

    def _tell(self, pipe: Pipeline, job_id: str, *events: progress.Event) -> None:
        for event in events:
            pipe.xadd(
                self._keys.events(job_id),
                _pairs(progress.encode(event)),
                maxlen=self._settings.events_kept,
                approximate=False,
            )
        # inside MULTI, so that the hint leaves only after the write is on disk
        pipe.publish(self._keys.news_channel, job_id)

    def _trim_owner(self, pipe: Pipeline, owner: str, now_us: int) -> None:
        """Twice a record's life, renewed by every accept and ending: no list outlives its jobs for long."""
        kept_s = 2 * self._settings.record_ttl_s
        pipe.zremrangebyscore(self._keys.owner(owner), 0, now_us - kept_s * 1_000_000)
        pipe.expire(self._keys.owner(owner), kept_s)


def _pairs(fields: Mapping[str, str]) -> dict[FieldT, EncodableT]:
    """The same fields under redis-py's wider, invariant type."""
    return dict(fields.items())
