"""One attempt at one job: from the claim to a commit under its fence, whatever happens between."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol

from deployments.protocol import events
from deployments.protocol.errors import Internal, ModelUnavailable, NotFound, WeftError
from deployments.protocol.request import ResolvedRequest
from serve_app.jobs import inputs
from serve_app.jobs.events import Event
from serve_app.jobs.job import Job, JobError, JobState, ResumePoint, StoredArtifact
from serve_app.jobs.store.store import Claim, JobStore, StaleClaim
from serve_app.redis.transactions import StoreUnreachable
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore, handover_path, input_path, output_path

START_LIMIT_S = 3_600.0  # from the claim to Started: a model may have to be downloaded first
STOP_LIMIT_S = 5.0  # for a cancelled call to end; after that it is left behind
RETRY_FIRST_S, RETRY_MAX_S = 0.5, 8.0  # before a failed attempt is given back: replicas need a moment
OUTAGE_FIRST_S, OUTAGE_MAX_S = 0.05, 1.0  # between calls to a store that does not answer
PENDING_EVENTS_KEPT = 128  # events that wait for the store during an outage

logger = logging.getLogger(__name__)


class EventStream(Protocol):
    """The events of one request; closing it cancels the work. Async generators are such."""

    def __aiter__(self) -> AsyncIterator[events.Event]: ...

    def aclose(self) -> Awaitable[None]: ...


class ModelBackend(Protocol):
    """What a dispatcher needs of the workshop."""

    def free_slots(self) -> Mapping[str, int]:
        """Per model id, how many more jobs it may take from this dispatcher.

        A job counts as taken from the first `anext` on its stream until the stream ends.
        """

    def generate(
        self, model_id: str, request: ResolvedRequest, /, *, user: str = "", resume: bytes | None = None
    ) -> EventStream:
        """Run the request. Raises ModelUnavailable while iterating when the model's replica is lost.

        user: whose work it is; users share a model fairly.  resume: the state of an events.Handover.
        """


class AbortReason(Enum):
    """Why an attempt ends before its model has."""

    cancelled = "cancelled"
    stale_claim = "stale"
    drained = "drained"
    too_long = "too_long"
    never_started = "never_started"


@dataclass(frozen=True, slots=True)
class Output:
    """What the model delivered."""

    artifacts: tuple[StoredArtifact, ...]
    generation_s: float


class Attempt:
    """Runs a claimed job once. Used for one `run`, by the dispatcher that claimed it."""

    def __init__(
        self,
        claim: Claim,
        *,
        store: JobStore,
        results: ResultStore,
        models: ModelBackend,
        settings: Settings,
        time_limit_s: float,
    ) -> None:
        self.claim = claim
        self.taken_by_model = (
            claim.job.cached_from is not None
        )  # the model counts this job itself, or never will
        self._store = store
        self._results = results
        self._models = models
        self._settings = settings
        self._time_limit_s = time_limit_s
        self._aborted: asyncio.Future[AbortReason] = asyncio.get_running_loop().create_future()
        self._pending_events: deque[Event] = deque(maxlen=PENDING_EVENTS_KEPT)
        self._step, self._steps = claim.job.step, claim.job.steps  # 0 unless it goes on from a handover
        self._replica_stopped = False
        self._cached_files_lost = False
        self._infrastructure_error = False  # what failed had nothing to do with the request
        self._resume_point: ResumePoint | None = None  # what this attempt leaves to the next
        self._finishing = False

    def abort(self, reason: AbortReason) -> None:
        """End the attempt early; the first reason counts."""
        if not self._aborted.done():
            self._aborted.set_result(reason)

    async def run(self, wakeup: asyncio.Event) -> Job | None:
        """The job as this attempt left it; None when it had been given to somebody else.

        stir: set by a hint that the job shall be cancelled, and by us when there is news to tell.
        """
        self._wakeup = wakeup
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(START_LIMIT_S, self.abort, AbortReason.never_started)
        lease = asyncio.create_task(self._keep_lease())
        work = asyncio.create_task(self._generate())
        try:
            first: set[asyncio.Future[Any]] = {work, lease, self._aborted}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if lease.done():
                lease.result()  # a bug there must not leave the work running without a lease
            await _stop(work)
            result = _result(work)
            not_request_fault = self._replica_stopped or self._cached_files_lost
            if isinstance(result, events.Failed) and result.retryable and not not_request_fault:
                await self._wait_for_recovery()
            self._finishing = True
            self._wakeup.set()
            await asyncio.wait({lease}, timeout=OUTAGE_MAX_S)
            job = await self._commit_with_retry(lambda: self._commit(result))
            await self._remove_leftovers(job)
            return job
        finally:
            self._timer.cancel()
            for task in (work, lease):
                task.cancel()

    async def _generate(self) -> Output | events.Failed:
        """What the model delivered, its files stored, or why there is nothing."""
        try:
            if self.claim.job.cached_from is not None:
                return await self._copy_cached_files(self.claim.job.cached_from)
            request, resume = await self._request_with_inputs(), await self._resume_state()
            owner = self.claim.job.owner
            stream = self._models.generate(request.model, request, user=owner, resume=resume)
            try:
                self.taken_by_model = True
                return await self._consume(stream)
            finally:
                await stream.aclose()
        except WeftError as error:
            return events.Failed.of(error)
        except OSError:
            logger.exception("files of a job cannot be read or stored", extra=self._log_fields)
            self._infrastructure_error = True
            return events.Failed(
                "internal", "the files of the job could not be read or stored", retryable=True
            )
        except Exception:
            logger.exception("a job failed by a bug", extra=self._log_fields)
            return events.Failed.of(Internal("the job failed by an error of ours; it was logged"))

    async def _copy_cached_files(self, source_id: str) -> Output | events.Failed:
        """The files of an identical job, under our own name; the model makes them anew if they are lost."""
        try:
            cached_from = await self._store.get(source_id)
            if cached_from.files_expired:
                raise NotFound("its files were removed")
            return Output(tuple([await self._copy(artifact) for artifact in cached_from.artifacts]), 0.0)
        except (NotFound, OSError) as error:
            logger.info(
                "a job's twin is gone; its model runs it", extra={**self._log_fields, "error": str(error)}
            )
            self._cached_files_lost = True
            return events.Failed("model_unavailable", "the files of an earlier job are gone", retryable=True)

    async def _copy(self, artifact: StoredArtifact) -> StoredArtifact:
        claim = self.claim
        path = output_path(claim.job.id, claim.attempt, artifact.index, artifact.kind, artifact.media_type)
        await self._results.copy(artifact.path, path)
        return replace(artifact, path=path)

    async def _request_with_inputs(self) -> ResolvedRequest:
        """The request with the pictures it was given."""
        job = self.claim.job
        taken = {
            name: await self._results.get(input_path(job.id, name)) for name in inputs.names(job.request)
        }
        return inputs.attach(job.request, taken)

    async def _resume_state(self) -> bytes | None:
        """What a stopped replica left of this job; None where there is nothing to go on from."""
        resume_point = self.claim.job.resume_point
        if resume_point is None:
            return None
        try:
            return await self._results.get(resume_point.path, sha256=resume_point.sha256)
        except (WeftError, OSError):
            logger.warning("what was handed over is lost; the job begins anew", extra=self._log_fields)
            return None

    async def _consume(self, stream: EventStream) -> Output | events.Failed:
        artifacts: list[StoredArtifact] = []
        async for event in stream:
            match event:
                case events.Started(steps=steps):
                    self._limit_time()
                    if self._step == 0:  # else the steps before were told by whoever handed over
                        self._record_step(0, steps)
                case events.Step(step=step, steps=steps):
                    self._record_step(step, steps)
                case events.Stage() | events.Preview():
                    self._publish(event)
                case events.Handover(step=step, state=state):
                    self._replica_stopped = True
                    await self._store_resume_point(step, state)
                case events.Artifact():
                    artifacts.append(await self._store_artifact(event))
                case events.Done(generation_s=generation_s):
                    return Output(tuple(artifacts), generation_s)
                case events.Failed():
                    return event
        raise ModelUnavailable("the model stopped without an answer")

    async def _store_artifact(self, artifact: events.Artifact) -> StoredArtifact:
        claim, kind = self.claim, artifact.kind
        path = output_path(claim.job.id, claim.attempt, artifact.index, kind, artifact.media_type)
        file = await self._results.put(path, artifact.data)
        return StoredArtifact(
            index=artifact.index,
            kind=kind,
            path=file.path,
            media_type=artifact.media_type,
            size_bytes=file.size_bytes,
            sha256=file.sha256,
            width=artifact.width,
            height=artifact.height,
            seed=artifact.seed,
        )

    async def _store_resume_point(self, step: int, state: bytes) -> None:
        path = handover_path(self.claim.job.id, self.claim.attempt)
        try:
            file = await self._results.put(path, state)
        except OSError:
            logger.exception("a handover was not stored; the job will begin anew", extra=self._log_fields)
            return
        self._resume_point = ResumePoint(file.path, file.sha256, step, self._steps)

    def _limit_time(self) -> None:
        self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._time_limit_s, self.abort, AbortReason.too_long)

    def _record_step(self, step: int, steps: int) -> None:
        self._step, self._steps = max(step, self._step), steps
        self._publish(events.Step(self._step, steps))

    def _publish(self, event: Event) -> None:
        """Without waiting: the store may be slow or away, the model shall not notice."""
        self._pending_events.append(event)
        self._wakeup.set()

    async def _keep_lease(self) -> None:
        """Renew the lease and tell news, at once when there are any, and in time when there are none."""
        pause_s = OUTAGE_FIRST_S
        while self._pending_events or not self._finishing:
            if not self._pending_events:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._settings.heartbeat_s):
                        await self._wakeup.wait()
            self._wakeup.clear()
            pending_events = list(self._pending_events)
            self._pending_events.clear()
            if self._finishing and not pending_events:
                return
            try:
                cancel_requested = await self._store.heartbeat(
                    self.claim, step=self._step, steps=self._steps, pending_events=pending_events
                )
            except StaleClaim:
                self.abort(AbortReason.stale_claim)
                return
            except WeftError:  # away or full: the model goes on, the lease decides
                self._pending_events.extendleft(
                    reversed(pending_events[: PENDING_EVENTS_KEPT - len(self._pending_events)])
                )
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, OUTAGE_MAX_S)
                continue
            pause_s = OUTAGE_FIRST_S
            if cancel_requested:
                self.abort(AbortReason.cancelled)

    async def _wait_for_recovery(self) -> None:
        """Keep the lease for a moment, growing with every failure: the cause may pass."""
        pause_s = min(RETRY_FIRST_S * 4**self.claim.job.failures, RETRY_MAX_S)
        await asyncio.wait({self._aborted}, timeout=pause_s)

    async def _commit(self, result: Output | events.Failed | None) -> Job:
        """The job after the one write that counts. result: None when the work was halted."""
        claim, store = self.claim, self._store
        if isinstance(result, Output):  # even if halted meanwhile: the work is there, the fence decides
            return await store.complete(claim, result.artifacts, result.generation_s)
        match self._aborted.result() if self._aborted.done() else None:
            case AbortReason.stale_claim:
                raise StaleClaim(claim.job.id)
            case AbortReason.cancelled:
                return await store.cancelled(claim)
            case AbortReason.drained:
                return await store.requeue(claim, _DRAINED, counted=False, resume_point=self._resume_point)
            case AbortReason.too_long:
                text = f"the job ran longer than {self._time_limit_s:g} s, which is its model's limit"
                return await store.fail(claim, JobError("internal", text), fails_followers=False)
            case AbortReason.never_started:
                return await store.requeue(claim, _NEVER_STARTED)
        assert result is not None, "only halted work has no result"
        error = JobError(result.kind, result.message, result.param, result.retry_after_s)
        if result.retryable:
            counted = not (self._replica_stopped or self._cached_files_lost)
            fails_followers = not self._infrastructure_error
            return await store.requeue(
                claim,
                error,
                counted=counted,
                resume_point=self._resume_point,
                fails_followers=fails_followers,
            )
        return await store.fail(claim, error)

    async def _commit_with_retry(self, commit: Callable[[], Awaitable[Job]]) -> Job | None:
        """The committed job; None when somebody else has it. Waits for the store as long as it takes."""
        pause_s = OUTAGE_FIRST_S
        while True:
            try:
                return await commit()
            except StaleClaim:
                return None
            except StoreUnreachable:
                logger.warning("the job store is away; a commit waits", extra=self._log_fields)
            except WeftError as error:
                logger.warning("the job store refuses a commit: %s", error.message, extra=self._log_fields)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, OUTAGE_MAX_S)

    async def _remove_leftovers(self, job: Job | None) -> None:
        """Remove files that nobody will ask for: this attempt's if it lost, all others' if it won."""
        job_id = self.claim.job.id
        try:
            if job is None or not job.state.ended:
                await self._results.discard(job_id, self.claim.attempt)
                resume_point = handover_path(job_id, self.claim.attempt)
                if job is None or job.resume_point is None or job.resume_point.path != resume_point:
                    await self._results.remove(resume_point)
            else:
                won = job.artifacts if job.state is JobState.completed else ()
                await self._results.sweep(job_id, keep=[artifact.path for artifact in won])
        except OSError:
            logger.exception("files of a job were not removed", extra=self._log_fields)

    @property
    def _log_fields(self) -> dict[str, object]:
        return {"job_id": self.claim.job.id, "attempt": self.claim.attempt}


_DRAINED = JobError("model_unavailable", "the worker was stopped while it ran this job")
_NEVER_STARTED = JobError("model_unavailable", "the model did not begin within an hour")


async def _stop(work: asyncio.Task[Output | events.Failed]) -> None:
    """Cancel the work if it still runs, and give it STOP_LIMIT_S to unwind."""
    if work.done():
        return
    work.cancel()
    _, running = await asyncio.wait({work}, timeout=STOP_LIMIT_S)
    if running:
        logger.warning("a cancelled call did not end in time; it is left behind")


def _result(work: asyncio.Task[Output | events.Failed]) -> Output | events.Failed | None:
    """What the work gave; None when it was cancelled."""
    return None if not work.done() or work.cancelled() else work.result()
