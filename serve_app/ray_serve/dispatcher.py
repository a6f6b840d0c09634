"""The Serve deployment class of a dispatcher: runs jobs/worker/dispatch.py and maintenance.py."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Mapping

from deployments import __version__
from deployments.observability.ray_metrics import RayMeter
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import Internal
from deployments.protocol.log_context import join_serve_log
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker.cluster_role import ClusterRole
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.jobs.worker.maintenance import Maintenance
from serve_app.ray_serve.capacity import CapacityTracker, JobTimeLimits
from serve_app.ray_serve.cluster_identity import cluster_identity
from serve_app.ray_serve.model_client import ModelClient
from serve_app.ray_serve.served_models import ServedModels
from serve_app.services import Services
from serve_app.settings import Settings
from serve_app.storage.url_fetcher import UrlFetcher


class DispatcherReplica:
    """Takes jobs from the store and runs them on the models; it is not called from outside."""

    _dispatcher: Dispatcher | None = None  # None until the constructor is done
    _maintenance: asyncio.Task[None] | None = None

    async def __init__(  # type: ignore[misc]  # Serve awaits it: the tasks below run on the replica's loop
        self,
        settings: Settings,
        cards: Mapping[str, ModelCard] | None,
        dispatchers: int,
    ) -> None:
        """cards: those of its application; None: models are applications of their own."""
        join_serve_log("serve_app")
        served = ServedModels.of_replica(cards)
        services = Services.open(settings)
        capacity = CapacityTracker(served, ModelClient(served, settings.checkpoints), dispatchers)
        self._dispatcher = Dispatcher(
            services.store,
            services.results,
            capacity,
            settings,
            time_limits_s=JobTimeLimits(served.cards),
            meter=RayMeter(),
            report_demand=capacity.report_demand,
            role=await _role(services.store, served),
        )
        # a task with the context of a Serve request would be cancelled with that request
        self._dispatching = asyncio.create_task(self._dispatcher.run(), context=contextvars.Context())
        maintenance = Maintenance(
            services.store, services.results, UrlFetcher(settings.webhook_hosts), settings
        )
        self._maintenance = asyncio.create_task(maintenance.run(), context=contextvars.Context())

    async def active(self) -> int:
        """Number of jobs that run on this dispatcher."""
        return 0 if self._dispatcher is None else self._dispatcher.active

    def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this raises."""
        if self._dispatching.done() or self._maintenance is None or self._maintenance.done():
            raise Internal("the dispatcher's loop has ended")

    async def __del__(self) -> None:
        """Called and awaited by Serve before the replica stops: running jobs return to the queue at once."""
        if self._maintenance is not None:
            self._maintenance.cancel()
        if self._dispatcher is not None:
            await self._dispatcher.drain()


async def _role(store: JobStore, served: ServedModels) -> ClusterRole:
    """The part of this application, on this Ray cluster, in the work of all that share the store."""
    identity, place = await asyncio.to_thread(cluster_identity)

    def is_ready() -> bool:
        served.poll()
        return served.all_run

    cluster = f"{served.application}@{identity}"
    return ClusterRole(store, cluster, release=__version__, place=place, is_ready=is_ready)
