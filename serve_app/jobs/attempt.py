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
from deployments.protocol.request import FittedRequest
from serve_app.jobs import pictures, progress
from serve_app.jobs.job import Handover, Job, JobError, JobState, StoredArtifact
from serve_app.jobs.store import Claim, JobStore, Stale
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore, handover_path, input_path, output_path
from serve_app.transaction import StoreUnreachable

START_LIMIT_S = 3_600.0  # from the claim to Started: a model may have to be downloaded first
STOP_LIMIT_S = 5.0  # for a cancelled call to end; after that it is left behind
RETRY_FIRST_S, RETRY_MAX_S = 0.5, 8.0  # before a failed attempt is given back: replicas need a moment
OUTAGE_FIRST_S, OUTAGE_MAX_S = 0.05, 1.0  # between calls to a store that does not answer
NEWS_KEPT = 128  # events that wait for the store during an outage

logger = logging.getLogger(__name__)


class EventStream(Protocol):
    """The events of one request; closing it cancels the work. Async generators are such."""

    def __aiter__(self) -> AsyncIterator[events.Event]: ...

    def aclose(self) -> Awaitable[None]: ...


class Models(Protocol):
    """What a dispatcher needs of the workshop."""

    def free_slots(self) -> Mapping[str, int]:
        """Per model id, how many more jobs it may take from this dispatcher.

        A job counts as taken from the first `anext` on its stream until the stream ends.
        """

    def generate(
        self, model_id: str, request: FittedRequest, /, *, user: str = "", resume: bytes | None = None
    ) -> EventStream:
        """Run the request. Raises ModelUnavailable while iterating when the model's replica is lost.

        user: whose work it is; users share a model fairly.  resume: the state of an events.Handover.
        """


class Halt(Enum):
    """Why an attempt ends before its model has."""

    cancelled = "cancelled"
    stale = "stale"
    drained = "drained"
    too_long = "too_long"
    never_started = "never_started"


@dataclass(frozen=True, slots=True)
class Made:
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
        models: Models,
        settings: Settings,
        time_limit_s: float,
    ) -> None:
        self.claim = claim
        self.handed_over = claim.job.twin is not None  # the model counts this job itself, or never will
        self._store = store
        self._results = results
        self._models = models
        self._settings = settings
        self._time_limit_s = time_limit_s
        self._halted: asyncio.Future[Halt] = asyncio.get_running_loop().create_future()
        self._news: deque[progress.Event] = deque(maxlen=NEWS_KEPT)
        self._step, self._steps = claim.job.step, claim.job.steps  # 0 unless it goes on from a handover
        self._replica_stopped = False
        self._twin_lost = False
        self._ill_luck = False  # what failed had nothing to do with the request
        self._handover: Handover | None = None  # what this attempt leaves to the next
        self._finishing = False

    def halt(self, reason: Halt) -> None:
        """End the attempt early; the first reason counts."""
        if not self._halted.done():
            self._halted.set_result(reason)

    async def run(self, stir: asyncio.Event) -> Job | None:
        """The job as this attempt left it; None when it had been given to somebody else.

        stir: set by a hint that the job shall be cancelled, and by us when there is news to tell.
        """
        self._stir = stir
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(START_LIMIT_S, self.halt, Halt.never_started)
        lease = asyncio.create_task(self._keep_lease())
        work = asyncio.create_task(self._generate())
        try:
            first: set[asyncio.Future[Any]] = {work, lease, self._halted}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if lease.done():
                lease.result()  # a bug there must not leave the work running without a lease
            await _ended(work)
            result = _result(work)
            innocent = self._replica_stopped or self._twin_lost
            if isinstance(result, events.Failed) and result.retryable and not innocent:
                await self._wait_for_recovery()
            self._finishing = True
            self._stir.set()
            await asyncio.wait({lease}, timeout=OUTAGE_MAX_S)
            job = await self._persistently(lambda: self._commit(result))
            await self._tidy(job)
            return job
        finally:
            self._timer.cancel()
            for task in (work, lease):
                task.cancel()

    async def _generate(self) -> Made | events.Failed:
        """What the model delivered, its files stored, or why there is nothing."""
        try:
            if self.claim.job.twin is not None:
                return await self._copied(self.claim.job.twin)
            request, resume = await self._whole_request(), await self._state_handed_over()
            owner = self.claim.job.owner
            stream = self._models.generate(request.model, request, user=owner, resume=resume)
            try:
                self.handed_over = True
                return await self._take_in(stream)
            finally:
                await stream.aclose()
        except WeftError as error:
            return events.Failed.of(error)
        except OSError:
            logger.exception("files of a job cannot be read or stored", extra=self._about)
            self._ill_luck = True
            return events.Failed(
                "internal", "the files of the job could not be read or stored", retryable=True
            )
        except Exception:
            logger.exception("a job failed by a bug", extra=self._about)
            return events.Failed.of(Internal("the job failed by an error of ours; it was logged"))

    async def _copied(self, twin_id: str) -> Made | events.Failed:
        """The files of an identical job, under our own name; the model makes them anew if they are lost."""
        try:
            twin = await self._store.get(twin_id)
            if twin.files_expired:
                raise NotFound("its files were removed")
            return Made(tuple([await self._copy(artifact) for artifact in twin.artifacts]), 0.0)
        except (NotFound, OSError) as error:
            logger.info("a job's twin is gone; its model runs it", extra={**self._about, "error": str(error)})
            self._twin_lost = True
            return events.Failed("model_unavailable", "the files of an earlier job are gone", retryable=True)

    async def _copy(self, artifact: StoredArtifact) -> StoredArtifact:
        claim = self.claim
        path = output_path(claim.job.id, claim.attempt, artifact.index, artifact.kind, artifact.media_type)
        await self._results.copy(artifact.path, path)
        return replace(artifact, path=path)

    async def _whole_request(self) -> FittedRequest:
        """The request with the pictures it was given."""
        job = self.claim.job
        taken = {
            name: await self._results.get(input_path(job.id, name)) for name in pictures.names(job.request)
        }
        return pictures.attach(job.request, taken)

    async def _state_handed_over(self) -> bytes | None:
        """What a stopped replica left of this job; None where there is nothing to go on from."""
        handover = self.claim.job.handover
        if handover is None:
            return None
        try:
            return await self._results.get(handover.path, sha256=handover.sha256)
        except (WeftError, OSError):
            logger.warning("what was handed over is lost; the job begins anew", extra=self._about)
            return None

    async def _take_in(self, stream: EventStream) -> Made | events.Failed:
        artifacts: list[StoredArtifact] = []
        async for event in stream:
            match event:
                case events.Started(steps=steps):
                    self._limit_time()
                    if self._step == 0:  # else the steps before were told by whoever handed over
                        self._note(0, steps)
                case events.Step(step=step, steps=steps):
                    self._note(step, steps)
                case events.Stage(name=name, done=done, total=total):
                    self._tell(progress.Stage(name, done, total))
                case events.Preview(step=step, media_type=media_type, data=data):
                    self._tell(progress.Preview(step, media_type, data))
                case events.Handover(step=step, state=state):
                    self._replica_stopped = True
                    await self._keep_state(step, state)
                case events.Artifact():
                    artifacts.append(await self._keep(event))
                case events.Done(generation_s=generation_s):
                    return Made(tuple(artifacts), generation_s)
                case events.Failed():
                    return event
        raise ModelUnavailable("the model stopped without an answer")

    async def _keep(self, artifact: events.Artifact) -> StoredArtifact:
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

    async def _keep_state(self, step: int, state: bytes) -> None:
        path = handover_path(self.claim.job.id, self.claim.attempt)
        try:
            file = await self._results.put(path, state)
        except OSError:
            logger.exception("a handover was not stored; the job will begin anew", extra=self._about)
            return
        self._handover = Handover(file.path, file.sha256, step, self._steps)

    def _limit_time(self) -> None:
        self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._time_limit_s, self.halt, Halt.too_long)

    def _note(self, step: int, steps: int) -> None:
        self._step, self._steps = max(step, self._step), steps
        percent = min(99, 100 * self._step // steps) if steps else 0
        self._tell(progress.Step(self._step, steps, percent))

    def _tell(self, event: progress.Event) -> None:
        """Without waiting: the store may be slow or away, the model shall not notice."""
        self._news.append(event)
        self._stir.set()

    async def _keep_lease(self) -> None:
        """Renew the lease and tell news, at once when there are any, and in time when there are none."""
        pause_s = OUTAGE_FIRST_S
        while self._news or not self._finishing:
            if not self._news:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._settings.heartbeat_s):
                        await self._stir.wait()
            self._stir.clear()
            news = list(self._news)
            self._news.clear()
            if self._finishing and not news:
                return
            try:
                cancel_requested = await self._store.heartbeat(
                    self.claim, step=self._step, steps=self._steps, news=news
                )
            except Stale:
                self.halt(Halt.stale)
                return
            except WeftError:  # away or full: the model goes on, the lease decides
                self._news.extendleft(reversed(news[: NEWS_KEPT - len(self._news)]))
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, OUTAGE_MAX_S)
                continue
            pause_s = OUTAGE_FIRST_S
            if cancel_requested:
                self.halt(Halt.cancelled)

    async def _wait_for_recovery(self) -> None:
        """Keep the lease for a moment, growing with every failure: the cause may pass."""
        pause_s = min(RETRY_FIRST_S * 4**self.claim.job.failures, RETRY_MAX_S)
        await asyncio.wait({self._halted}, timeout=pause_s)

    async def _commit(self, result: Made | events.Failed | None) -> Job:
        """The job after the one write that counts. result: None when the work was halted."""
        claim, store = self.claim, self._store
        if isinstance(result, Made):  # even if halted meanwhile: the work is there, the fence decides
            return await store.complete(claim, result.artifacts, result.generation_s)
        match self._halted.result() if self._halted.done() else None:
            case Halt.stale:
                raise Stale(claim.job.id)
            case Halt.cancelled:
                return await store.cancelled(claim)
            case Halt.drained:
                return await store.requeue(claim, _DRAINED, counted=False, handover=self._handover)
            case Halt.too_long:
                text = f"the job ran longer than {self._time_limit_s:g} s, which is its model's limit"
                return await store.fail(claim, JobError("internal", text), alike=False)
            case Halt.never_started:
                return await store.requeue(claim, _NEVER_STARTED)
        assert result is not None, "only halted work has no result"
        error = JobError(result.kind, result.message, result.param, result.retry_after_s)
        if result.retryable:
            counted = not (self._replica_stopped or self._twin_lost)
            alike = not self._ill_luck
            return await store.requeue(claim, error, counted=counted, handover=self._handover, alike=alike)
        return await store.fail(claim, error)

    async def _persistently(self, commit: Callable[[], Awaitable[Job]]) -> Job | None:
        """The committed job; None when somebody else has it. Waits for the store as long as it takes."""
        pause_s = OUTAGE_FIRST_S
        while True:
            try:
                return await commit()
            except Stale:
                return None
            except StoreUnreachable:
                logger.warning("the job store is away; a commit waits", extra=self._about)
            except WeftError as error:
                logger.warning("the job store refuses a commit: %s", error.message, extra=self._about)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, OUTAGE_MAX_S)

    async def _tidy(self, job: Job | None) -> None:
        """Remove files that nobody will ask for: this attempt's if it lost, all others' if it won."""
        job_id = self.claim.job.id
        try:
            if job is None or not job.state.ended:
                await self._results.discard(job_id, self.claim.attempt)
                handover = handover_path(job_id, self.claim.attempt)
                if job is None or job.handover is None or job.handover.path != handover:
                    await self._results.remove(handover)
            else:
                won = job.artifacts if job.state is JobState.completed else ()
                await self._results.sweep(job_id, keep=[artifact.path for artifact in won])
        except OSError:
            logger.exception("files of a job were not removed", extra=self._about)

    @property
    def _about(self) -> dict[str, object]:
        return {"job_id": self.claim.job.id, "attempt": self.claim.attempt}


_DRAINED = JobError("model_unavailable", "the worker was stopped while it ran this job")
_NEVER_STARTED = JobError("model_unavailable", "the model did not begin within an hour")


async def _ended(work: asyncio.Task[Made | events.Failed]) -> None:
    """Cancel the work if it still runs, and give it STOP_LIMIT_S to unwind."""
    if work.done():
        return
    work.cancel()
    _, running = await asyncio.wait({work}, timeout=STOP_LIMIT_S)
    if running:
        logger.warning("a cancelled call did not end in time; it is left behind")


def _result(work: asyncio.Task[Made | events.Failed]) -> Made | events.Failed | None:
    """What the work gave; None when it was cancelled."""
    return None if not work.done() or work.cancelled() else work.result()
