"""The API's one way into the jobs: submit, get, list, follow, cancel, delete, read files, sign links."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from datetime import date

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest, Conflict, NotFound, Overloaded, Unauthorized
from deployments.protocol.events import Preview
from deployments.protocol.request import GenerationRequest
from serve_app.job_ids import is_job_id
from serve_app.jobs import follow, signed_links
from serve_app.jobs.job import IdempotencyKey, Job, JobState, StoredArtifact
from serve_app.jobs.store.owner_index import ALL_JOBS, JobFilter, JobPage
from serve_app.jobs.store.reads import NO_SUCH_JOB
from serve_app.jobs.store.store import FROM_START, JobStore
from serve_app.jobs.submission import Submission
from serve_app.jobs.usage import UsageRow
from serve_app.jobs.webhook_events import owner_secret
from serve_app.settings import Settings
from serve_app.storage.model_digests import ModelDigests
from serve_app.storage.results import ResultStore

MAX_DAYS = 366  # of a report of usage


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as its owner sees it."""

    job: Job
    position: int | None = None  # 1: next of its model; None when it does not wait
    starts_in_s: float | None = None  # seconds from now, estimated; None: unknown, or it does not wait


class JobService:
    """What owners may do with their jobs. A job of another owner is NotFound, as if it did not exist."""

    def __init__(
        self,
        store: JobStore,
        results: ResultStore,
        cards: Mapping[str, ModelCard],
        settings: Settings,
        digests: ModelDigests | None = None,
    ) -> None:
        self._store = store
        self._results = results
        self._submission = Submission(store, results, cards, settings, digests or ModelDigests())
        self._wakeups = store.event_wakeups()

    async def submit(
        self,
        request: GenerationRequest,
        owner: str,
        *,
        idempotency_key: IdempotencyKey | None = None,
        webhook: str | None = None,
        images_per_day: int | None = None,
        api_key: str = "",
        budget_per_month: float | None = None,
        notices: tuple[Adjustment, ...] = (),
    ) -> Job:
        """The accepted job: durable, and certain to end. The same idempotency key again returns the same job.

        webhook: URL of an allowed host that receives the ending.
        images_per_day, budget_per_month: the owner's quota.
        api_key: prefix of the key that the job's usage is counted for.
        notices: what was changed before; the job's warnings begin with it.
        Raises what `validate` raises, Overloaded (also when the disk is nearly full), RateLimited, Conflict,
        QuotaExceeded.
        """
        return await self._submission.submit(
            request,
            owner,
            idempotency_key=idempotency_key,
            webhook=webhook,
            images_per_day=images_per_day,
            api_key=api_key,
            budget_per_month=budget_per_month,
            notices=notices,
        )

    async def empty_cache(self, owner: str) -> None:
        """From now on no request of this owner is answered by an earlier result."""
        await self._store.cache.empty(owner)

    async def usage(self, first: date | None, last: date | None, user: str | None) -> list[UsageRow]:
        """What jobs used that ended from the first day to the last, UTC; None: this month's first day, today.

        user: only theirs; None: everyone's. Raises BadRequest for a period that is empty or over a year.
        """
        today = await self._store.usage.today()
        last = last or today
        first = first or last.replace(day=1)
        if not 0 <= (last - first).days <= MAX_DAYS:
            raise BadRequest(f"`from` must be before `to`, by at most {MAX_DAYS} days", param="from")
        return await self._store.usage.rows(first, last, user)

    async def webhook_secret(self, owner: str) -> str:
        """The key that this owner's webhooks are signed with."""
        return owner_secret(await self._store.cache.secret(), owner)

    async def get(self, job_id: str, owner: str) -> JobView:
        """The job and its position in the queue. Raises NotFound."""
        job = await self._owned_job(job_id, owner)
        if job.state is not JobState.queued:
            return JobView(job)
        position = await self._store.position(job)
        if position is None:
            return JobView(job)
        starts_in_s = await self._store.throughput.starts_in_s(job.request.model, position)
        return JobView(job, position, starts_in_s)

    async def list(
        self,
        owner: str,
        *,
        cursor: str | None = None,
        limit: int = 50,
        where: JobFilter = ALL_JOBS,
    ) -> JobPage:
        """The owner's jobs, newest first; a page may be short and still have a next_cursor."""
        return await self._store.page(owner, cursor=cursor, limit=limit, where=where)

    async def cancel(self, job_id: str, owner: str) -> Job:
        """The job: cancelled, or running with cancel_requested, or as it ended before."""
        await self._owned_job(job_id, owner)
        job = await self._store.cancel(job_id)
        if job.state is JobState.cancelled:
            await self._results.sweep(job_id)
        return job

    async def delete(self, job_id: str, owner: str) -> None:
        """Delete an ended job: files, events, record. Raises Conflict while it waits or runs."""
        job = await self._owned_job(job_id, owner)
        if not job.state.ended:
            raise Conflict(f"the job is {job.state.value}; cancel it first")
        await self._results.sweep(job_id)  # first: if it fails, the caller sees that and can try again
        await self._store.delete(job_id)

    async def wait(self, job_id: str, owner: str, timeout_s: float) -> Job:
        """The job when it has ended, or as it is after timeout_s."""
        await self._owned_job(job_id, owner, with_retry=True)
        return await follow.wait(self._store, self._wakeups, job_id, timeout_s)

    async def follow(
        self, job_id: str, owner: str, after: str | None = None
    ) -> AsyncGenerator[follow.StreamEntry]:
        """(event id, event) from the start or after that id, live, until the ending.

        Raises NotFound, and BadRequest for a malformed id, at the first step.
        """
        await self._owned_job(job_id, owner, with_retry=True)
        async for entry in follow.follow(self._store, self._wakeups, job_id, after or FROM_START):
            yield entry

    async def latest_preview(self, job_id: str, owner: str) -> Preview | None:
        """The newest preview of the job; None while it has none. Raises NotFound."""
        await self._owned_job(job_id, owner)
        past = [event for _, event in await self._store.events(job_id)]
        return next((event for event in reversed(past) if isinstance(event, Preview)), None)

    async def artifact(
        self, job_id: str, owner: str, index: int, kind: str = "image"
    ) -> tuple[StoredArtifact, bytes]:
        """One finished file, its digest checked. Raises Conflict before the job has ended."""
        artifact = await self._find_artifact(job_id, owner, index, kind)
        return artifact, await self._results.get(artifact.path, sha256=artifact.sha256)

    async def artifact_part(self, artifact: StoredArtifact, start: int, end: int) -> bytes:
        """Bytes start..end, both included, of a file of a job that the caller was given."""
        return await self._results.read_range(artifact.path, start, end)

    async def link(self, job_id: str, owner: str, index: int, kind: str, for_s: float) -> str | None:
        """A URL of one finished file in the results storage that needs no key; None where it has no URLs."""
        artifact = await self._find_artifact(job_id, owner, index, kind)
        return await self._results.link(artifact.path, for_s)

    async def sign(self, job_id: str, owner: str, index: int, kind: str, expires_at: int) -> str:
        """A signature that opens one finished file without a key until then (unix seconds); see `shared`."""
        await self._find_artifact(job_id, owner, index, kind)
        return signed_links.signature(await self._store.cache.secret(), job_id, index, kind, expires_at)

    async def shared(self, job_id: str, index: int, kind: str, expires_at: int, signature: str) -> Job:
        """The job whose file was signed so. Raises Unauthorized, and NotFound once it was deleted."""
        secret = await self._store.cache.secret()
        if not signed_links.is_valid(secret, job_id, index, kind, expires_at, signature, time.time()):
            raise Unauthorized("this link is not valid, or has expired; ask its sender for a new one")
        return await self._store.get(job_id)

    async def health(self) -> None:
        """Raises Overloaded with the reason why no job can be accepted now."""
        await self._store.ping()
        if not await self._results.free_space_ok():
            raise Overloaded("there is too little disk space for new pictures")

    async def aclose(self) -> None:
        """End the subscription behind `wait` and `follow`."""
        await self._wakeups.aclose()

    async def _find_artifact(self, job_id: str, owner: str, index: int, kind: str) -> StoredArtifact:
        job = await self._owned_job(job_id, owner)
        if not job.state.ended:
            raise Conflict(f"the job is {job.state.value}; its files come when it has completed")
        if job.files_expired:
            raise NotFound("the files of this job were removed after their retention time; submit it again")
        for artifact in job.artifacts:
            if (artifact.index, artifact.kind) == (index, kind):
                return artifact
        raise NotFound(f"the job has no {kind} number {index}")

    async def _owned_job(self, job_id: str, owner: str, *, with_retry: bool = False) -> Job:
        """The job. Raises NotFound, with the same message whatever the cause."""
        if not is_job_id(job_id):
            raise NotFound(NO_SUCH_JOB)
        job = await (follow.get_with_retry(self._store, job_id) if with_retry else self._store.get(job_id))
        if job.owner != owner:
            raise NotFound(NO_SUCH_JOB)
        return job
