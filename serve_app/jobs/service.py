"""The API's only door to jobs: submit, look, list, follow, cancel, delete, fetch a picture."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from deployments.protocol import log_context
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest, Conflict, Forbidden, NotFound, Overloaded, Unauthorized
from deployments.protocol.request import GenerationRequest, ResolvedRequest
from deployments.validation.resolve import Adjustment
from serve_app.admission.validation import validate
from serve_app.job_ids import is_job_id, new_job_id
from serve_app.jobs import follow, inputs, signed_links
from serve_app.jobs.job import IdempotencyKey, Job, JobState, StoredArtifact, SubmitOptions
from serve_app.jobs.store.cache_keys import compute_cache_key
from serve_app.jobs.store.owner_index import JobPage
from serve_app.jobs.store.store import FROM_START, NO_SUCH_JOB, JobStore
from serve_app.jobs.webhook_events import owner_secret
from serve_app.observability.tracing import current_traceparent
from serve_app.redis.transactions import StoreUnreachable
from serve_app.settings import Settings
from serve_app.storage.model_digests import ModelDigests
from serve_app.storage.results import ResultStore, input_path
from serve_app.storage.url_fetcher import UrlFetcher

FRESH_SEEDS = 2**32  # as other tools draw them, and exact in JavaScript's numbers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as its owner sees it."""

    job: Job
    position: int | None = None  # 1: next of its model; None when it does not wait
    starts_in_s: float | None = None  # seconds from now, estimated; None: unknown, or it does not wait


class JobService:
    """What the owners of jobs may do. Somebody else's job looks like one that never was."""

    def __init__(
        self,
        store: JobStore,
        results: ResultStore,
        cards: Mapping[str, ModelCard],
        settings: Settings,
        digests: ModelDigests | None = None,
    ) -> None:
        self._digests = digests or ModelDigests()
        self._secret: bytes | None = None  # read when first needed
        self._webhooks = UrlFetcher(settings.webhook_hosts)
        self._store = store
        self._results = results
        self._cards = cards
        self._settings = settings
        self._wakeups = store.event_wakeups()

    async def submit(
        self,
        request: GenerationRequest,
        owner: str,
        *,
        idempotency_key: IdempotencyKey | None = None,
        webhook: str | None = None,
        images_per_day: int | None = None,
    ) -> Job:
        """The accepted job: durable, and sure to end. The same `once` again gives the job there is.

        webhook: an address that is told of the ending; of an allowed host.
        images_per_day: the owner's quota.
        Raises what `admit` raises, Overloaded (also when the disk is nearly full), RateLimited, Conflict,
        QuotaExceeded.
        """
        if webhook is not None:
            webhook = self._check_webhook(webhook)
        resolved = validate(request, self._cards, secrets.randbelow(FRESH_SEEDS))
        card = self._cards[resolved.request.model]  # now: models may go while we wait
        if not await self._results.free_space_ok():
            raise Overloaded("there is too little room for new pictures; try again later", retry_after_s=60)
        job_id = new_job_id()
        _log_adjustments(job_id, resolved.adjustments)
        detached, images = inputs.detach(resolved.request)
        options = SubmitOptions(
            idempotency_key=idempotency_key,
            cache_key=None if request.seed is None else await self._cache_key(resolved.request, card, owner),
            webhook=webhook,
            images_per_day=images_per_day,
            max_wait_s=card.serving.max_wait_s,
            request_id=log_context.current().request_id,
            trace=current_traceparent(),
        )
        job = await self._accept(job_id, owner, detached, images, resolved.adjustments, options)
        if job.id == job_id:
            logger.info("job accepted", extra={"job_id": job_id, "model": job.request.model})
        return job

    def _check_webhook(self, url: str) -> str:
        """The address as it will be called. Raises BadRequest or Forbidden, naming the field."""
        if not self._webhooks.enabled:
            raise Forbidden(
                "webhooks are off here; the operator may allow hosts by webhook_hosts", param="webhook_url"
            )
        try:
            return self._webhooks.check(url)
        except (BadRequest, Forbidden) as error:
            raise type(error)(error.message, param="webhook_url") from None

    async def _cache_key(self, request: ResolvedRequest, card: ModelCard, owner: str) -> str | None:
        """What stands for this very picture; None where the model's files cannot be looked at."""
        if not self._settings.cache:
            return None
        models = await self._digests.of(card, request, self._cards.get(card.refiner or ""))
        if models is None:
            return None
        secret = await self._shared_secret()
        epoch = await self._store.cache.epoch(owner)
        return await asyncio.to_thread(compute_cache_key, secret, owner, epoch, request, models)

    async def _shared_secret(self) -> bytes:
        if self._secret is None:
            self._secret = await self._store.cache.secret()
        return self._secret

    async def empty_cache(self, owner: str) -> None:
        """No request of this owner is answered by what was made before now."""
        await self._store.cache.empty(owner)

    async def webhook_secret(self, owner: str) -> str:
        """What this owner's webhooks are signed with."""
        return owner_secret(await self._shared_secret(), owner)

    async def get(self, job_id: str, owner: str) -> JobView:
        """The job and its place in the queue. Raises NotFound."""
        job = await self._owned_job(job_id, owner)
        if job.state is not JobState.queued:
            return JobView(job)
        position = await self._store.position(job)
        starts_in_s = None if position is None else await self._store.starts_in_s(job, position)
        return JobView(job, position, starts_in_s)

    async def list(
        self,
        owner: str,
        *,
        cursor: str | None = None,
        limit: int = 50,
        state: JobState | None = None,
        model: str | None = None,
    ) -> JobPage:
        """The owner's jobs, newest first; a page may be short and still have a next_cursor."""
        return await self._store.page(owner, cursor=cursor, limit=limit, state=state, model=model)

    async def cancel(self, job_id: str, owner: str) -> Job:
        """The job: cancelled, or running with cancel_requested, or as it ended before."""
        await self._owned_job(job_id, owner)
        job = await self._store.cancel(job_id)
        if job.state is JobState.cancelled:
            await self._results.sweep(job_id)
        return job

    async def delete(self, job_id: str, owner: str) -> None:
        """Forget an ended job: files, events, record. Raises Conflict while it waits or runs."""
        job = await self._owned_job(job_id, owner)
        if not job.state.ended:
            raise Conflict(f"the job is {job.state.value}; cancel it first")
        await self._results.sweep(job_id)  # first: if it fails, the caller can see that and try again
        await self._store.delete(job_id)

    async def wait(self, job_id: str, owner: str, timeout_s: float) -> Job:
        """The job when it has ended, or as it stands after timeout_s."""
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

    async def artifact(
        self, job_id: str, owner: str, index: int, kind: str = "image"
    ) -> tuple[StoredArtifact, bytes]:
        """One finished file, its digest checked. Raises Conflict before the job has ended."""
        artifact = await self._find_artifact(job_id, owner, index, kind)
        return artifact, await self._results.get(artifact.path, sha256=artifact.sha256)

    async def link(self, job_id: str, owner: str, index: int, kind: str, for_s: float) -> str | None:
        """An address of one finished file that opens without a key; None where results have none."""
        artifact = await self._find_artifact(job_id, owner, index, kind)
        return await self._results.link(artifact.path, for_s)

    async def sign(self, job_id: str, owner: str, index: int, kind: str, expires_at: int) -> str:
        """What opens one finished file to anybody until then (unix seconds); see `shared`."""
        await self._find_artifact(job_id, owner, index, kind)
        return signed_links.signature(await self._shared_secret(), job_id, index, kind, expires_at)

    async def shared(self, job_id: str, index: int, kind: str, expires_at: int, signature: str) -> Job:
        """The job whose file was signed so. Raises Unauthorized, and NotFound once it was deleted."""
        secret = await self._shared_secret()
        if not signed_links.is_valid(secret, job_id, index, kind, expires_at, signature, time.time()):
            raise Unauthorized("this link is not valid, or no longer; ask whoever sent it for a new one")
        return await self._store.get(job_id)

    async def _find_artifact(self, job_id: str, owner: str, index: int, kind: str) -> StoredArtifact:
        job = await self._owned_job(job_id, owner)
        if not job.state.ended:
            raise Conflict(f"the job is {job.state.value}; its pictures come when it has completed")
        if job.files_expired:
            raise NotFound("the files of this job were removed when their time was up; submit it again")
        for artifact in job.artifacts:
            if (artifact.index, artifact.kind) == (index, kind):
                return artifact
        raise NotFound(f"the job has no {kind} number {index}")

    async def artifact_part(self, artifact: StoredArtifact, start: int, end: int) -> bytes:
        """Bytes start..end, both included, of a file that `get` showed to its owner."""
        return await self._results.read_range(artifact.path, start, end)

    async def health(self) -> None:
        """Raises Overloaded with the reason why no job can be accepted now."""
        await self._store.ping()
        if not await self._results.free_space_ok():
            raise Overloaded("there is too little room for new pictures")

    async def aclose(self) -> None:
        """End the subscription behind `wait` and `follow`."""
        await self._wakeups.aclose()

    async def _accept(
        self,
        job_id: str,
        owner: str,
        request: ResolvedRequest,
        images: Mapping[str, bytes],
        adjustments: tuple[Adjustment, ...],
        options: SubmitOptions,
    ) -> Job:
        try:
            for name, data in images.items():
                await self._results.put(input_path(job_id, name), data)
            job = await self._store.accept(job_id, owner, request, adjustments, options)
            if job.id != job_id and images:
                await self._results.sweep(job_id)
            return job
        except StoreUnreachable:
            raise  # the job may have been accepted all the same, so its pictures stay
        except BaseException:
            if images:
                await self._results.sweep(job_id)
            raise

    async def _owned_job(self, job_id: str, owner: str, *, with_retry: bool = False) -> Job:
        """The job. Raises NotFound, in the same words whatever the cause."""
        if not is_job_id(job_id):
            raise NotFound(NO_SUCH_JOB)
        job = await (follow.get_with_retry(self._store, job_id) if with_retry else self._store.get(job_id))
        if job.owner != owner:
            raise NotFound(NO_SUCH_JOB)
        return job


def _log_adjustments(job_id: str, adjustments: tuple[Adjustment, ...]) -> None:
    for adjustment in adjustments:
        logger.warning("%s", adjustment.message, extra={"job_id": job_id, "correction": adjustment.code})
