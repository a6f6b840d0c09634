"""Delivers webhooks: the ending of a job, to the address its owner gave.

At least once: a receiver recognises repetitions by the header webhook-id, which names the job's one ending.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Protocol

from deployments.protocol.errors import WeftError
from serve_app.jobs.job import Job
from serve_app.jobs.store.outbox import Outbox, OutboxEntry
from serve_app.jobs.webhook_events import event_body, owner_secret, signature_headers

POST_TIMEOUT_S = 5.0
RETRY_DELAYS_S = (5.0, 60.0, 300.0, 1_800.0, 7_200.0, 18_000.0)  # after the first, second, ... failure
GONE = 410  # by the standard: this receiver wants no more webhooks

logger = logging.getLogger(__name__)


class HttpPoster(Protocol):
    """Posts to addresses that callers give, guarded against server-side request forgery."""

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float) -> int:
        """The status of the response. Raises WeftError when there is none or the address is not allowed."""


class WebhookDeliverer:
    """Delivers what is due. Any number may share an outbox."""

    def __init__(self, outbox: Outbox, poster: HttpPoster, secret: bytes) -> None:
        self._outbox = outbox
        self._poster = poster
        self._secret = secret

    async def deliver(self) -> int:
        """Try each due entry once, and return how many there were."""
        entries = await self._outbox.claim_due()
        await asyncio.gather(*(self._deliver(entry) for entry in entries))
        return len(entries)

    async def _deliver(self, entry: OutboxEntry) -> None:
        fields: dict[str, object] = {"job_id": entry.job.id, "tries": entry.tries}
        status = await self._send(entry.job)
        if status is not None and 200 <= status < 300:
            logger.info("webhook delivered", extra=fields)
        elif status == GONE or entry.tries > len(RETRY_DELAYS_S):
            logger.warning("webhook given up", extra={**fields, "answer": status})
        else:
            await self._outbox.retry_later(entry, RETRY_DELAYS_S[entry.tries - 1])
            return
        await self._outbox.done(entry)

    async def _send(self, job: Job) -> int | None:
        """The receiver's status; None when the request could not be made."""
        event_id = f"evt_{job.id}"
        body = event_body(job, event_id)
        headers = signature_headers(owner_secret(self._secret, job.owner), event_id, datetime.now(UTC), body)
        try:
            return await self._poster.post(job.webhook or "", body, headers, timeout_s=POST_TIMEOUT_S)
        except WeftError as error:
            logger.info("webhook not delivered: %s", error.kind, extra={"job_id": job.id})
            return None
