"""Attempts at jobs: claimed under a lease, renewed by heartbeats, and ended or released under a fence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.errors import NotFound
from serve_app.jobs import events
from serve_app.jobs.job import Job, JobError, JobState, ResumePoint, StoredArtifact
from serve_app.jobs.store.endings import CoalescedGroup
from serve_app.jobs.store.fair_queue import start_tag_of
from serve_app.jobs.store.key_names import Keys
from serve_app.jobs.store.reads import read_group, read_job
from serve_app.jobs.store.record import job_from
from serve_app.jobs.store.throughput import ThroughputStats
from serve_app.jobs.store.transitions import Transitions
from serve_app.redis.transactions import (
    begin,
    clock_us,
    get_hash,
    redis_errors,
    transact,
    transact_unless_conflict,
)

HEADS = 4  # first jobs read per queue, so that dispatchers that collide claim the next one
CLAIM_ROUNDS = 8
WORKER_LOST = (
    "the worker was lost {failures} times while it ran this job; it was given up. "
    "A smaller size or fewer pictures may help."
)

Finish = Callable[[Pipeline, Job, int, CoalescedGroup], Job]  # queues writes; the int is the time in us


class StaleClaim(Exception):
    """Another worker has the job, or it has ended: the results of this attempt are discarded."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A job under a lease. Its attempt number is the fence of every later write."""

    job: Job

    @property
    def attempt(self) -> int:
        return self.job.attempt


class Leases:
    """What workers do with jobs. Raises StoreUnreachable whenever the server cannot be asked."""

    def __init__(
        self, redis: Redis, keys: Keys, transitions: Transitions, throughput: ThroughputStats
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._transitions = transitions
        self._throughput = throughput

    async def claim(self, free: Mapping[str, int]) -> Claim | None:
        """The first waiting job of the queues with free slots, now under a lease; None: there is no work.

        free: slots by model id, or by COPY_QUEUE.
        """
        queues = [queue for queue, slots in free.items() if slots > 0]
        for _ in range(CLAIM_ROUNDS if queues else 0):
            waiting = await self._heads(queues)
            for _, job_id, queue in waiting:
                claim = await self._claim_one(job_id, queue)
                if claim is not None:
                    return claim
            if not waiting:
                break
        return None

    async def _heads(self, queues: Sequence[str]) -> list[tuple[float, str, str]]:
        """(score, job id, queue) of the first jobs of all queues, lowest score first."""
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for queue in queues:
                    pipe.zrange(self._keys.pending_of(queue), 0, HEADS - 1, withscores=True)
                heads = await pipe.execute()
        return sorted(
            (score, job_id, queue)
            for queue, found in zip(queues, heads, strict=True)
            for job_id, score in found
        )

    async def _claim_one(self, job_id: str, queue: str) -> Claim | None:
        """The claim, or None when another worker was faster. Watches only the hash: queues always change.

        A conflict means that the job was claimed or cancelled just now, so it is not tried again: with eight
        workers at one queue, second tries were most of the transactions.
        """
        keys = self._keys

        async def decide(pipe: Pipeline) -> Claim | None:
            fields = await get_hash(pipe, keys.job(job_id))
            job = job_from(job_id, fields) if fields.get("state") == JobState.queued else None
            if job is None or job.queue != queue:
                begin(pipe)
                self._transitions.drop_from_queue(pipe, job_id, queue)
                return None
            stored = float(await pipe.hget(keys.fair_queue(job.request.model), "v") or 0.0)
            virtual_time = max(stored, start_tag_of(job.queue_score, job.request.priority))
            now_us = await clock_us(pipe)
            begin(pipe)
            return Claim(self._transitions.claim(pipe, job, now_us, virtual_time))

        return await transact_unless_conflict(self._redis, [keys.job(job_id)], decide)

    async def heartbeat(
        self,
        claim: Claim,
        *,
        step: int = 0,
        steps: int = 0,
        pending_events: Sequence[events.Event] = (),
        resume_point: ResumePoint | None = None,
        device_us: int = 0,
    ) -> bool:
        """Renew the lease, store progress, publish events; True when cancellation was requested.

        resume_point: where the next attempt starts if this one is lost; None leaves it as it is.
        device_us: device microseconds of this attempt so far.
        Raises StaleClaim.
        """
        job_id = claim.job.id

        async def decide(pipe: Pipeline) -> bool:
            job = await self._read_attempted(pipe, claim)
            _check_fence(job, claim)
            now_us = await clock_us(pipe)
            begin(pipe)
            self._transitions.renew(
                pipe,
                job,
                now_us,
                step=step,
                steps=steps,
                pending_events=pending_events,
                resume_point=resume_point,
                device_us=claim.job.device_us + device_us,
            )
            return job.cancel_requested

        return await transact(self._redis, [self._keys.job(job_id)], decide)

    async def complete(
        self,
        claim: Claim,
        artifacts: Sequence[StoredArtifact],
        generation_s: float,
        warnings: Sequence[Adjustment] = (),
        *,
        device_us: int = 0,
    ) -> Job:
        """The ended job: completed with these files, or cancelled if that was requested before.

        warnings: added to those that it was accepted with. device_us: device microseconds of this attempt.
        """

        def finish(pipe: Pipeline, job: Job, now_us: int, group: CoalescedGroup) -> Job:
            if job.cancel_requested:
                return self._transitions.endings.end(pipe, job, JobState.cancelled, now_us, group)
            done = replace(
                job,
                artifacts=tuple(artifacts),
                generation_s=generation_s,
                warnings=(*job.warnings, *warnings),
            )
            if job.cached_from is None:
                self._throughput.record_duration(pipe, job.request.model, generation_s)
            return self._transitions.endings.end(pipe, done, JobState.completed, now_us, group)

        return await self._finish(claim, finish, device_us=device_us)

    async def fail(
        self, claim: Claim, error: JobError, *, fails_followers: bool = True, device_us: int = 0
    ) -> Job:
        """The ended job: failed for this reason, or cancelled if that was requested before.

        fails_followers: an identical request would fail the same way, so the jobs that wait for this one do.
        device_us: device microseconds of this attempt.
        """

        def finish(pipe: Pipeline, job: Job, now_us: int, group: CoalescedGroup) -> Job:
            if job.cancel_requested:
                return self._transitions.endings.end(pipe, job, JobState.cancelled, now_us, group)
            failed = replace(job, error=error)
            return self._transitions.endings.end(
                pipe, failed, JobState.failed, now_us, group, fails_followers=fails_followers
            )

        return await self._finish(claim, finish, device_us=device_us)

    async def cancelled(self, claim: Claim, *, device_us: int = 0) -> Job:
        """The ended job, after its worker has stopped. device_us: device microseconds of this attempt."""

        def finish(pipe: Pipeline, job: Job, now_us: int, group: CoalescedGroup) -> Job:
            return self._transitions.endings.end(pipe, job, JobState.cancelled, now_us, group)

        return await self._finish(claim, finish, device_us=device_us)

    async def requeue(
        self,
        claim: Claim,
        error: JobError,
        *,
        counted: bool = True,
        resume_point: ResumePoint | None = None,
        fails_followers: bool = True,
        device_us: int = 0,
    ) -> Job:
        """The job, waiting again with its old score; or failed for `error` at max_attempts.

        counted: this attempt counts towards max_attempts (a draining worker's does not).
        resume_point: where the next attempt starts; None leaves that to Transitions.release.
        fails_followers, device_us: see `fail`.
        """

        def finish(pipe: Pipeline, job: Job, now_us: int, group: CoalescedGroup) -> Job:
            return self._transitions.release(
                pipe,
                job,
                error,
                now_us,
                counted=counted,
                resume_point=resume_point,
                group=group,
                fails_followers=fails_followers,
            )

        return await self._finish(claim, finish, already=JobState.queued, device_us=device_us)

    async def reap(self, at_most: int = 64) -> list[Job]:
        """Jobs whose lease expired, in their new state: queued again, failed, or cancelled."""
        with redis_errors():
            now_us = await clock_us(self._redis)
            expired = cast(
                list[str],
                await self._redis.zrangebyscore(self._keys.running, 0, now_us, start=0, num=at_most),
            )
        reaped = [await self._reap_one(job_id) for job_id in expired]
        return [job for job in reaped if job is not None]

    async def _reap_one(self, job_id: str) -> Job | None:
        async def decide(pipe: Pipeline) -> Job | None:
            fields = await get_hash(pipe, self._keys.job(job_id))
            now_us = await clock_us(pipe)
            # the lease in the hash is watched: a heartbeat in between makes us read it again
            if fields.get("state") != JobState.processing or int(fields["lease_us"]) > now_us:
                return None
            job = job_from(job_id, fields)
            error = JobError("internal", WORKER_LOST.format(failures=job.failures + 1))
            group = await read_group(pipe, self._keys, job)
            begin(pipe)
            return self._transitions.release(pipe, job, error, now_us, counted=True, group=group)

        return await transact(self._redis, [self._keys.job(job_id)], decide)

    async def _finish(
        self, claim: Claim, finish: Finish, already: JobState | None = None, *, device_us: int
    ) -> Job:
        """Leave `processing` under the fence.

        A job that has ended under our attempt is returned as it is: that was our own write whose answer
        was lost, or the reaper's. The same goes for a job in the state `already`.
        """

        async def decide(pipe: Pipeline) -> Job:
            job = await self._read_attempted(pipe, claim)
            if job.attempt == claim.attempt and (job.state.ended or job.state is already):
                return job
            _check_fence(job, claim)
            group = await read_group(pipe, self._keys, job)
            now_us = await clock_us(pipe)
            begin(pipe)
            used_us = claim.job.device_us + device_us
            return finish(pipe, replace(job, device_us=max(job.device_us, used_us)), now_us, group)

        return await transact(self._redis, [self._keys.job(claim.job.id)], decide)

    async def _read_attempted(self, pipe: Pipeline, claim: Claim) -> Job:
        """The claimed job as it is stored. Raises StaleClaim when it was deleted meanwhile."""
        try:
            return await read_job(pipe, self._keys, claim.job.id)
        except NotFound:
            raise StaleClaim(claim.job.id) from None


def _check_fence(job: Job, claim: Claim) -> None:
    """Raises StaleClaim unless the job is running under this claim's attempt."""
    if job.state is not JobState.processing or job.attempt != claim.attempt:
        raise StaleClaim(f"{job.id}: {job.state.value}, attempt {job.attempt}, not {claim.attempt}")
