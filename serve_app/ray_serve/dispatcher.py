"""DispatcherReplica: the Serve shell that runs jobs/dispatch.py."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Mapping

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import Internal
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.jobs.worker.maintenance import Maintenance
from serve_app.observability.metrics import RayMeter, join_serve_log
from serve_app.ray_serve.model_client import CapacityTracker, JobTimeLimits, ModelClient
from serve_app.services import Services
from serve_app.settings import Settings
from serve_app.storage.url_fetcher import UrlFetcher


class DispatcherReplica:
    """Carries jobs from the store to the models. Nobody calls it; it looks for work itself."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it, so that the loop below is the replica's
        self,
        settings: Settings,
        cards: Mapping[str, ModelCard] | None,
        dispatchers: int,
    ) -> None:
        """cards: what its application serves; None: models are applications of their own."""
        join_serve_log()
        models = ModelClient.of_replica(cards)
        services = Services.open(settings)
        capacity = CapacityTracker(models, dispatchers)
        self._dispatcher = Dispatcher(
            services.store,
            services.results,
            capacity,
            settings,
            time_limits_s=JobTimeLimits(models.cards),
            meter=RayMeter(),
            report_demand=capacity.report_demand,
        )
        # a task with the context of a Serve request would be cancelled with that request
        self._task = asyncio.create_task(self._dispatcher.run(), context=contextvars.Context())
        maintenance = Maintenance(
            services.store, services.results, UrlFetcher(settings.webhook_hosts), settings
        )
        self._maintenance = asyncio.create_task(maintenance.run(), context=contextvars.Context())

    async def active(self) -> int:
        """Jobs running here now."""
        return self._dispatcher.active

    def check_health(self) -> None:
        """Called by Serve; raising has the replica replaced."""
        if self._task.done() or self._maintenance.done():
            raise Internal("the dispatcher's loop has ended")

    async def __del__(self) -> None:
        """Called and awaited by Serve before the replica goes: running jobs are given back at once."""
        if hasattr(self, "_chores"):
            self._maintenance.cancel()
        if hasattr(self, "_dispatcher"):
            await self._dispatcher.drain()
