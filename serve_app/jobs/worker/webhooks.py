"""Tells the ending of a job to the address its owner named, signed as standardwebhooks.com has it.

At least once: a receiver tells repetitions by the header webhook-id, which names the job's one ending.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Protocol

from deployments.protocol.errors import WeftError
from serve_app.jobs.job import Job
from serve_app.jobs.store.outbox import Outbox, OutboxEntry
from serve_app.jobs.webhook_events import event_body, owner_secret, signature_headers

POST_TIMEOUT_S = 5.0
RETRY_DELAYS_S = (
    5.0,
    60.0,
    300.0,
    1_800.0,
    7_200.0,
    18_000.0,
)  # after the first, second, ... failure; then no more
GONE = 410  # by the standard: this receiver wants no more

logger = logging.getLogger(__name__)


class HttpPoster(Protocol):
    """Sends to addresses that others name, guarded (storage/fetch.py)."""

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float) -> int:
        """The status that came back. Raises WeftError when there is none, or the address is not allowed."""


class WebhookDeliverer:
    """Delivers what is due. Any number may share an outbox."""

    def __init__(self, outbox: Outbox, post: HttpPoster, secret: bytes) -> None:
        self._outbox = outbox
        self._post = post
        self._secret = secret

    async def deliver(self) -> int:
        """Try each parcel that is due once; how many there were."""
        entries = await self._outbox.claim_due()
        await asyncio.gather(*(self._deliver(entry) for entry in entries))
        return len(entries)

    async def _deliver(self, entry: OutboxEntry) -> None:
        job = entry.job
        about: dict[str, object] = {"job_id": job.id, "tries": entry.tries}
        answer = await self._send(job)
        if answer is not None and 200 <= answer < 300:
            logger.info("a webhook was delivered", extra=about)
        elif answer == GONE or entry.tries > len(RETRY_DELAYS_S):
            logger.warning("a webhook was given up", extra={**about, "answer": answer})
        else:
            await self._outbox.retry_later(entry, RETRY_DELAYS_S[entry.tries - 1])
            return
        await self._outbox.done(entry)

    async def _send(self, job: Job) -> int | None:
        """The receiver's status; None when it could not be asked."""
        event_id = f"evt_{job.id}"
        body = event_body(job, event_id)
        headers = signature_headers(owner_secret(self._secret, job.owner), event_id, int(time.time()), body)
        try:
            return await self._post.post(job.webhook or "", body, headers, timeout_s=POST_TIMEOUT_S)
        except WeftError as error:
            logger.info("a webhook was not delivered: %s", error.kind, extra={"job_id": job.id})
            return None
