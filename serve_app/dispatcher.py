"""DispatcherReplica: the Serve shell that runs jobs/dispatch.py."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Mapping

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import Internal
from serve_app.handles import DispatcherModels, ModelHandles, TimeLimits
from serve_app.jobs.chores import Chores
from serve_app.jobs.dispatch import Dispatcher
from serve_app.services import Services
from serve_app.settings import Settings
from serve_app.storage.fetch import Fetcher
from serve_app.telemetry import RayMeter, join_serve_log


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
        models = ModelHandles.of_replica(cards)
        services = Services.open(settings)
        room = DispatcherModels(models, dispatchers)
        self._dispatcher = Dispatcher(
            services.store,
            services.results,
            room,
            settings,
            time_limits_s=TimeLimits(models.cards),
            meter=RayMeter(),
            tell_demand=room.tell_demand,
        )
        # a task with the context of a Serve request would be cancelled with that request
        self._task = asyncio.create_task(self._dispatcher.run(), context=contextvars.Context())
        chores = Chores(services.store, services.results, Fetcher(settings.webhook_hosts), settings)
        self._chores = asyncio.create_task(chores.run(), context=contextvars.Context())

    async def active(self) -> int:
        """Jobs running here now."""
        return self._dispatcher.active

    def check_health(self) -> None:
        """Called by Serve; raising has the replica replaced."""
        if self._task.done() or self._chores.done():
            raise Internal("the dispatcher's loop has ended")

    async def __del__(self) -> None:
        """Called and awaited by Serve before the replica goes: running jobs are given back at once."""
        if hasattr(self, "_chores"):
            self._chores.cancel()
        if hasattr(self, "_dispatcher"):
            await self._dispatcher.drain()
