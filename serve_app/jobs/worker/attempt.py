"""One attempt at one job: from the claim, over the model's events, to a commit under the claim's fence."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from deployments.protocol import events
from deployments.protocol.adjustment import Adjustment
from deployments.protocol.errors import Internal, ModelUnavailable, NodeLost, NotFound, WeftError
from deployments.protocol.request import ResolvedRequest
from deployments.validation.preview_steps import preview_steps
from serve_app.jobs.job import Job, JobError, ResumePoint, StoredArtifact, restarted
from serve_app.jobs.store.leases import Claim, StaleClaim
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker.job_files import JobFiles
from serve_app.jobs.worker.late_warnings import late_warnings, warnings_of
from serve_app.jobs.worker.lease_keeper import OUTAGE_MAX_S, AbortReason, LeaseKeeper, outage_pauses
from serve_app.redis.transactions import StoreUnreachable
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore

START_LIMIT_S = 3_600.0  # from the claim to Started: a model may have to be downloaded first
STOP_LIMIT_S = 5.0  # for a cancelled call to end; after that it is left running
RETRY_FIRST_S, RETRY_MAX_S = 0.5, 8.0  # before a failed attempt is released: replicas need time to recover

DRAINED = JobError("model_unavailable", "the worker was stopped while it ran this job")
NEVER_STARTED = JobError("model_unavailable", "the model did not begin within an hour")

logger = logging.getLogger(__name__)


class EventStream(Protocol):
    """The events of one request; closing it cancels the request. Async generators are event streams."""

    def __aiter__(self) -> AsyncIterator[events.Event]: ...

    def aclose(self) -> Awaitable[None]: ...


class ModelBackend(Protocol):
    """What a dispatcher needs of the models."""

    def free_slots(self) -> Mapping[str, int]:
        """Per model id, how many more jobs it may take from this dispatcher.

        A job counts as taken from the first `anext` on its stream until the stream ends.
        """

    def generate(
        self, model_id: str, request: ResolvedRequest, /, *, user: str = "", resume: bytes | None = None
    ) -> EventStream:
        """Run the request. Raises ModelUnavailable while iterating when the model's replica is lost.

        user: the owner of the work; users share a model fairly.  resume: the state of an events.Handover.
        """


@dataclass(frozen=True, slots=True)
class Output:
    """What the model delivered, stored."""

    artifacts: tuple[StoredArtifact, ...]
    generation_s: float
    warnings: tuple[Adjustment, ...] = ()  # that only a finished request can have


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no output."""

    event: events.Failed
    not_request_fault: bool = False  # a stopped replica, a lost node or lost files: not counted
    needs_pause: bool = True  # before the next attempt: replicas need time to recover
    infrastructure_error: bool = False  # identical requests would not fail the same way

    @property
    def error(self) -> JobError:
        return JobError(self.event.kind, self.event.message, self.event.param, self.event.retry_after_s)


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
        """time_limit_s: from the model's Started event to the end."""
        self.claim = claim
        # from then on the model counts this job itself; it never counts a copy
        self.taken_by_model = claim.job.cached_from is not None
        self._store = store
        self._files = JobFiles(claim, results)
        self._models = models
        self._settings = settings
        self._time_limit_s = time_limit_s
        self._aborted: asyncio.Future[AbortReason] = asyncio.get_running_loop().create_future()
        self._replica_stopped = False
        self._resume_point: ResumePoint | None = None  # for the next attempt
        self._storing: asyncio.Task[None] | None = None  # of a running request's state

    def abort(self, reason: AbortReason) -> None:
        """End the attempt early; the first reason counts."""
        if not self._aborted.done():
            self._aborted.set_result(reason)

    async def run(self, wakeup: asyncio.Event) -> Job | None:
        """The job as this attempt left it; None when another worker has it.

        wakeup: set when cancellation was requested, and by the attempt itself when it has events.
        """
        self._keeper = LeaseKeeper(
            self.claim, self._store.leases, self._settings.heartbeat_s, wakeup, self.abort
        )
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(START_LIMIT_S, self.abort, AbortReason.never_started)
        lease = asyncio.create_task(self._keeper.keep())
        work = asyncio.create_task(self._generate())
        try:
            first: set[asyncio.Future[Any]] = {work, lease, self._aborted}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if lease.done():
                lease.result()  # a bug there must not leave the work running without a lease
            await _stop(work)
            result = _result_of(work)
            if isinstance(result, Failure) and result.event.retryable and result.needs_pause:
                await self._wait_for_recovery()
            self._keeper.close()
            await asyncio.wait({lease}, timeout=OUTAGE_MAX_S)
            job = await self._commit_with_retry(result)
            await self._files.remove_leftovers(job)
            return job
        finally:
            self._timer.cancel()
            for task in (work, lease):
                task.cancel()

    async def _generate(self) -> Output | Failure:
        """What the model delivered, its files stored, or why there is nothing."""
        job = self.claim.job
        try:
            if job.cached_from is not None:
                return await self._copy_cached_files(job.cached_from)
            request, resume = await self._files.read_request(), await self._files.read_resume_state()
            stream = self._models.generate(request.model, request, user=job.owner, resume=resume)
            try:
                self.taken_by_model = True
                output = await self._consume(stream)
            finally:
                await stream.aclose()
                await self._end_storing()
            return output if resume is not None else self._with_restart_warning(output)
        except NodeLost as error:
            return Failure(events.Failed.of(error), not_request_fault=True)
        except WeftError as error:
            return self._failure(events.Failed.of(error))
        except OSError:
            logger.exception("files of a job cannot be read or stored", extra=self._log_fields)
            message = "the files of the job could not be read or stored"
            return self._failure(events.Failed("internal", message, retryable=True), infrastructure=True)
        except Exception:
            logger.exception("a job failed by a bug", extra=self._log_fields)
            bug = Internal("the job failed by an error of ours; it was logged")
            return self._failure(events.Failed.of(bug))

    def _failure(self, event: events.Failed, *, infrastructure: bool = False) -> Failure:
        stopped = self._replica_stopped
        return Failure(
            event, not_request_fault=stopped, needs_pause=not stopped, infrastructure_error=infrastructure
        )

    async def _copy_cached_files(self, source_id: str) -> Output | Failure:
        """Copies of the files of an identical job; when they are lost, the next attempt runs the model."""
        try:
            source = await self._store.get(source_id)
            if source.files_expired:
                raise NotFound("its files were removed")
            artifacts = await self._files.copy(source.artifacts)
            await self._show_finished(artifacts)
            return Output(artifacts, 0.0, late_warnings(source))
        except (NotFound, OSError) as error:
            logger.info(
                "cached files are lost; the model runs the job",
                extra={**self._log_fields, "error": str(error)},
            )
            message = "the files of an earlier job are gone"
            lost = events.Failed("model_unavailable", message, retryable=True)
            return Failure(lost, not_request_fault=True, needs_pause=False)

    async def _show_finished(self, artifacts: Sequence[StoredArtifact]) -> None:
        """The previews that the request asks for, where nothing is computed: they show the result."""
        request = self.claim.job.request
        steps = preview_steps(request.num_inference_steps, request.output.previews)
        thumbnail = next((artifact for artifact in artifacts if artifact.kind == "thumbnail"), None)
        if steps and thumbnail is not None:
            data = await self._files.read(thumbnail)
            for step in steps:
                self._keeper.publish(events.Preview(step, thumbnail.media_type, data))

    async def _consume(self, stream: EventStream) -> Output | Failure:
        """Publish progress and store artifacts until the stream's last event."""
        artifacts: list[StoredArtifact] = []
        async for event in stream:
            match event:
                case events.Started(steps=steps):
                    self._limit_time()
                    if self._keeper.step == 0:  # otherwise the steps before the resume point are published
                        self._keeper.record_step(0, steps)
                case events.Step(step=step, steps=steps):
                    self._keeper.record_device_time(event.device_s)
                    self._keeper.record_step(step, steps)
                case events.Stage() | events.Preview():
                    self._keeper.publish(event)
                case events.Checkpoint() | events.Handover():
                    await self._keep_state(event)
                case events.Artifact():
                    artifacts.append(await self._files.store_artifact(event))
                case events.Done():
                    self._keeper.record_device_time(event.device_s)
                    return Output(tuple(artifacts), event.generation_s, warnings_of(event))
                case events.Failed():
                    self._keeper.record_device_time(event.device_s)
                    return self._failure(event)
        raise ModelUnavailable("the model stopped without an answer")

    async def _keep_state(self, event: events.Checkpoint | events.Handover) -> None:
        """Store the state for the next attempt, beside the events that follow."""
        self._replica_stopped = isinstance(event, events.Handover)
        if event.state:  # else the latest before it counts
            await self._end_storing()
            self._storing = asyncio.create_task(self._store_state(event.step, event.state))

    async def _store_state(self, step: int, state: bytes) -> None:
        """Store the state, have the job's record name it, and remove earlier ones."""
        resume_point = await self._files.store_resume_point(step, self._keeper.steps, state)
        if resume_point is None:
            return
        self._resume_point = resume_point
        self._keeper.record_resume_point(resume_point)
        await self._files.remove_states([resume_point, self._keeper.resume_point])

    async def _end_storing(self) -> None:
        """Wait until the state that is being stored is there."""
        if self._storing is None:
            return
        try:
            await self._storing
        finally:
            self._storing.cancel()
            await asyncio.wait({self._storing})
            self._storing = None

    def _with_restart_warning(self, output: Output | Failure) -> Output | Failure:
        """The same, with a warning if the steps before a resume point had to be computed again."""
        point = self.claim.job.resume_point
        if point is None or isinstance(output, Failure):
            return output
        warning = restarted(point.step, point.steps, "the file with their state was lost")
        return replace(output, warnings=(*output.warnings, warning))

    def _limit_time(self) -> None:
        self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._time_limit_s, self.abort, AbortReason.too_long)

    async def _wait_for_recovery(self) -> None:
        """Keep the lease for a while, longer after every failure: the cause may pass."""
        pause_s = min(RETRY_FIRST_S * 4**self.claim.job.failures, RETRY_MAX_S)
        await asyncio.wait({self._aborted}, timeout=pause_s)

    async def _commit_with_retry(self, result: Output | Failure | None) -> Job | None:
        """The committed job; None when another worker has it. Waits for the store as long as it takes."""
        for pause_s in outage_pauses():
            try:
                return await self._commit(result)
            except StaleClaim:
                return None
            except StoreUnreachable:
                logger.warning("the job store is unreachable; a commit waits", extra=self._log_fields)
            except WeftError as error:
                logger.warning("the job store refuses a commit: %s", error.message, extra=self._log_fields)
            await asyncio.sleep(pause_s)
        raise AssertionError("the pauses never end")

    async def _commit(self, result: Output | Failure | None) -> Job:
        """The job after the one write that counts. result: None when the work was aborted."""
        claim, leases, device_us = self.claim, self._store.leases, self._keeper.device_us
        if isinstance(result, Output):  # even if aborted meanwhile: the files are there, the fence decides
            return await leases.complete(
                claim, result.artifacts, result.generation_s, result.warnings, device_us=device_us
            )
        if self._aborted.done():
            return await self._commit_aborted(self._aborted.result())
        assert result is not None, "only aborted work has no result"
        if not result.event.retryable:
            return await leases.fail(claim, result.error, device_us=device_us)
        return await leases.requeue(
            claim,
            result.error,
            counted=not result.not_request_fault,
            resume_point=self._resume_point,
            fails_followers=not result.infrastructure_error,
            device_us=device_us,
        )

    async def _commit_aborted(self, reason: AbortReason) -> Job:
        claim, leases, device_us = self.claim, self._store.leases, self._keeper.device_us
        match reason:
            case AbortReason.stale_claim:
                raise StaleClaim(claim.job.id)
            case AbortReason.cancelled:
                return await leases.cancelled(claim, device_us=device_us)
            case AbortReason.drained:
                return await leases.requeue(
                    claim, DRAINED, counted=False, resume_point=self._resume_point, device_us=device_us
                )
            case AbortReason.too_long:
                text = f"the job ran longer than {self._time_limit_s:g} s, which is its model's limit"
                error = JobError("internal", text)
                return await leases.fail(claim, error, fails_followers=False, device_us=device_us)
            case AbortReason.never_started:
                return await leases.requeue(claim, NEVER_STARTED)

    @property
    def _log_fields(self) -> dict[str, object]:
        return {"job_id": self.claim.job.id, "attempt": self.claim.attempt}


async def _stop(work: asyncio.Task[Output | Failure]) -> None:
    """Cancel the work if it still runs, and give it STOP_LIMIT_S to unwind."""
    if work.done():
        return
    work.cancel()
    _, running = await asyncio.wait({work}, timeout=STOP_LIMIT_S)
    if running:
        logger.warning("a cancelled call did not end in time; it is left running")


def _result_of(work: asyncio.Task[Output | Failure]) -> Output | Failure | None:
    """What the work returned; None when it was cancelled."""
    return None if not work.done() or work.cancelled() else work.result()
