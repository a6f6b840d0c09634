"""Periodic work besides jobs, done by any one dispatcher: webhooks, and sweeping of files."""

from __future__ import annotations

import asyncio
import logging
import time

from deployments.protocol.errors import WeftError
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker.retention import Retention
from serve_app.jobs.worker.webhooks import HttpPoster, WebhookDeliverer
from serve_app.redis.cancellation import raise_if_cancelled
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore

ROUND_S = 1.0
SWEEP_S = 60.0
ORPHANS_S = 3_600.0

logger = logging.getLogger(__name__)


class Maintenance:
    """Runs beside a Dispatcher until cancelled. Any number may share a store."""

    def __init__(self, store: JobStore, results: ResultStore, poster: HttpPoster, settings: Settings) -> None:
        self._store = store
        self._poster = poster
        self._retention = Retention(store.file_expiry, results, settings.result_ttl_s)
        self._deliverer: WebhookDeliverer | None = None

    async def run(self) -> None:
        """Run a round every ROUND_S. No error ends it."""
        while True:
            began = time.monotonic()
            try:
                await self.run_once()
            except WeftError as error:
                logger.info("maintenance waits: %s", error.message)
            except Exception:
                logger.exception("a maintenance task failed; it is tried again later")
            raise_if_cancelled()
            await asyncio.sleep(max(0.0, began + ROUND_S - time.monotonic()))

    async def run_once(self) -> None:
        """Do everything that is due."""
        if self._deliverer is None:
            secret = await self._store.cache.secret()
            self._deliverer = WebhookDeliverer(self._store.outbox, self._poster, secret)
        await self._deliverer.deliver()
        if await self._store.try_acquire("sweep", SWEEP_S):
            while await self._retention.sweep():
                pass
        if await self._store.try_acquire("orphans", ORPHANS_S):
            await self._retention.sweep_orphans()
