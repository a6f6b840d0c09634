"""Turning a request into a durable job: validation, cache key, input images, one write."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping

from deployments.protocol import log_context
from deployments.protocol.adjustment import Adjustment
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest, Forbidden, Overloaded, QuotaExceeded
from deployments.protocol.request import SEEDS, GenerationRequest, ResolvedRequest
from serve_app.admission.quota import DAY_S
from serve_app.admission.validation import validate
from serve_app.job_ids import new_job_id
from serve_app.jobs import inputs
from serve_app.jobs.job import IdempotencyKey, Job, NewJob, SubmitOptions
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.usage import MICRO
from serve_app.observability.tracing import current_traceparent
from serve_app.redis.transactions import StoreUnreachable
from serve_app.settings import Settings
from serve_app.storage.model_digests import ModelDigests
from serve_app.storage.results import ResultStore, input_path
from serve_app.storage.url_fetcher import UrlFetcher

logger = logging.getLogger(__name__)


class Submission:
    """Accepts requests as jobs. One for each process."""

    def __init__(
        self,
        store: JobStore,
        results: ResultStore,
        cards: Mapping[str, ModelCard],
        settings: Settings,
        digests: ModelDigests,
    ) -> None:
        """cards: of the models served here, by id; the mapping may change while the service runs."""
        self._store = store
        self._results = results
        self._cards = cards
        self._settings = settings
        self._digests = digests
        self._webhooks = UrlFetcher(settings.webhook_hosts)

    async def submit(
        self,
        request: GenerationRequest,
        owner: str,
        *,
        idempotency_key: IdempotencyKey | None,
        webhook: str | None,
        images_per_day: int | None,
        api_key: str = "",
        budget_per_month: float | None = None,
        notices: tuple[Adjustment, ...] = (),
    ) -> Job:
        """See JobService.submit."""
        webhook_url = None if webhook is None else self._check_webhook(webhook)
        resolved = validate(request, self._cards, secrets.randbelow(SEEDS))
        card = self._cards[resolved.request.model]  # read before waiting: models may be removed meanwhile
        if budget_per_month is not None:
            await self._check_budget(owner, budget_per_month)
        if not await self._results.free_space_ok():
            raise Overloaded(
                "there is too little disk space for new pictures; try again later", retry_after_s=60
            )
        options = SubmitOptions(
            idempotency_key=idempotency_key,
            cache_key=None if request.seed is None else await self._cache_key(resolved.request, card, owner),
            webhook=webhook_url,
            images_per_day=images_per_day,
            api_key=api_key,
            price_per_device_second=card.price_per_device_second,
            max_wait_s=card.serving.max_wait_s,
            request_id=log_context.current().request_id,
            trace=current_traceparent(),
        )
        detached, images = inputs.detach(resolved.request)
        new = NewJob(new_job_id(), owner, detached, (*notices, *resolved.adjustments), options)
        _log_adjustments(new.id, new.warnings)
        job = await self._accept(new, images)
        if job.id == new.id:
            logger.info("job accepted", extra={"job_id": job.id, "model": job.request.model})
        return job

    async def _check_budget(self, owner: str, budget_per_month: float) -> None:
        """Raises QuotaExceeded once the month's ended jobs cost the budget; running ones may exceed it."""
        spent = await self._store.usage.cost_of_month(owner) / MICRO
        if spent >= budget_per_month:
            raise QuotaExceeded(
                f"your jobs of this month have cost {spent:.2f}, and your budget is {budget_per_month:g}; "
                "ask the operator for a larger one, or try again next month",
                retry_after_s=DAY_S,
            )

    def _check_webhook(self, url: str) -> str:
        """The URL as it will be called. Raises BadRequest or Forbidden, naming the field."""
        if not self._webhooks.enabled:
            raise Forbidden(
                "webhooks are off here; the operator may allow hosts by webhook_hosts", param="webhook_url"
            )
        try:
            return self._webhooks.check(url)
        except (BadRequest, Forbidden) as error:
            raise type(error)(error.message, param="webhook_url") from None

    async def _cache_key(self, request: ResolvedRequest, card: ModelCard, owner: str) -> str | None:
        """The cache key of the request; None where the cache is off or the model's files cannot be read."""
        if not self._settings.cache:
            return None
        models = await self._digests.of(card, request, self._cards.get(card.refiner or ""))
        return None if models is None else await self._store.cache.key(owner, request, models)

    async def _accept(self, new: NewJob, images: Mapping[str, bytes]) -> Job:
        """Store the input images, then the job. Images are removed again when the job is not accepted."""
        try:
            for name, data in images.items():
                await self._results.put(input_path(new.id, name), data)
            job = await self._store.accept(new)
            if job.id != new.id and images:
                await self._results.sweep(new.id)
            return job
        except StoreUnreachable:
            raise  # the job may have been accepted nevertheless, so its images stay
        except BaseException:
            if images:
                await self._results.sweep(new.id)
            raise


def _log_adjustments(job_id: str, adjustments: tuple[Adjustment, ...]) -> None:
    for adjustment in adjustments:
        logger.warning("%s", adjustment.message, extra={"job_id": job_id, "correction": adjustment.code})
