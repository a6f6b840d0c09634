"""The models that are served, with the state of their replicas, as Serve's controller reports them."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import Mapping
from contextlib import suppress

import ray.exceptions
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationDetails, DeploymentDetails

from deployments.protocol.card import ModelCard
from serve_app.ray_serve.private_api import query_serve_details
from serve_app.ray_serve.routing import (
    MODEL_BUILDER,
    RUNNING_STATE,
    FleetRoutes,
    ModelRoute,
    ReplicaPool,
    RouteTable,
    RunningApplication,
    ServedCards,
    SingleApplicationRoutes,
)

STATES_MAX_AGE_S = 2.0
REFRESH_TIMEOUT_S = 5.0  # that a caller waits for Serve's controller; then the previous answer counts

logger = logging.getLogger(__name__)


class ServedModels:
    """Cards, routes and replica pools of the served models. One per replica, used from one event loop.

    All of it is as of the last answer of Serve's controller, which `poll` and `refresh` keep up to date.
    """

    def __init__(self, routes: RouteTable, application: str = "", deployment: str = "") -> None:
        """application, deployment: those of the replica in this process, for `peer_count`."""
        self._table = routes
        self._own = application, deployment
        self.all_run = False  # whether our application and those of all models run as they were deployed
        self.peer_count: int | None = None  # target number of replicas of our deployment; None: not known yet
        self._pools: dict[str, ReplicaPool] = {}  # by model; cards of one group share a pool
        self._refreshed_at = -math.inf
        self._refreshing: asyncio.Task[None] | None = None
        self._refresh_started = -math.inf

    @classmethod
    def of_replica(cls, cards: Mapping[str, ModelCard] | None) -> ServedModels:
        """For the replica in this process. cards: those of its application; None: it belongs to a gateway."""
        own = serve.get_replica_context()
        routes: RouteTable
        if cards is None:
            routes = FleetRoutes(own.app_name)
        else:
            routes = SingleApplicationRoutes(cards, own.app_name)
        return cls(routes, own.app_name, own.deployment)

    @property
    def application(self) -> str:
        """That of the replica in this process."""
        return self._own[0]

    @property
    def cards(self) -> ServedCards:
        """The cards of the served models; they may change at any await."""
        return ServedCards(self._table)

    @property
    def cards_are_dynamic(self) -> bool:
        """Whether models may come and go while this replica lives."""
        return self._table.dynamic

    @property
    def routes(self) -> Mapping[str, ModelRoute]:
        """By model id."""
        return self._table.routes

    def pool(self, model: str) -> ReplicaPool:
        """The replicas of a model; an empty pool for one that is not known."""
        return self._pools.get(model, ReplicaPool())

    def max_replicas(self, model: str) -> int:
        """Maximum number of replicas: as deployed (a config file may set it), else as the card says."""
        limit = self.pool(model).limit
        return self.routes[model].card.serving.max_replicas if limit is None else limit

    async def states(self) -> dict[str, str]:
        """By model: ready, loading, idle (scaled to zero) or error; at most 2 s old."""
        await self.refresh()
        return {model: self.pool(model).state for model in self.routes}

    async def refresh(self) -> None:
        """Wait for an answer that is at most 2 s old, or REFRESH_TIMEOUT_S while the controller is silent."""
        self.poll()
        if self._refreshing is not None and not self._refreshing.done():
            patience_s = self._refresh_started + REFRESH_TIMEOUT_S - time.monotonic()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, patience_s)):
                    await asyncio.shield(self._refreshing)

    def poll(self, *, force: bool = False) -> None:
        """Ask the controller in the background if its last answer is over 2 s old: it costs 20 ms of CPU.

        force: also when the answer is newer.
        """
        now = time.monotonic()
        is_fresh = now - self._refreshed_at <= STATES_MAX_AGE_S
        is_asking = self._refreshing is not None and not self._refreshing.done()
        if is_asking or (is_fresh and not force):
            return
        self._refresh_started = now
        # with the context of a Serve request the task could be cancelled with that request
        self._refreshing = asyncio.get_running_loop().create_task(
            self._query_serve(), context=contextvars.Context()
        )

    async def _query_serve(self) -> None:
        try:
            applications = await asyncio.to_thread(_running_applications)
        except (ray.exceptions.RayError, RayServeException) as error:
            logger.warning("the Serve controller did not report its status", extra={"error": repr(error)})
            return
        self.take_in(applications)

    def take_in(self, applications: Mapping[str, RunningApplication]) -> None:
        """Update routes and pools from the running applications, by name."""
        self._table.update(applications)
        self.peer_count = _find_pool(applications, *self._own).limit
        ours = [applications.get(self.application), *filter(_has_models, applications.values())]
        self.all_run = bool(self.routes) and all(one and one.status == RUNNING_STATE for one in ours)
        for model, route in self.routes.items():
            self._pools[model] = _find_pool(applications, route.application, route.deployment)
        self._refreshed_at = time.monotonic()


def others_run() -> bool:
    """Whether other replicas of the deployment of this process run. Blocks for one call to the controller."""
    own = serve.get_replica_context()
    return _find_pool(_running_applications(), own.app_name, own.deployment).running > 0


def _has_models(application: RunningApplication) -> bool:
    return application.import_path == MODEL_BUILDER


def _find_pool(
    applications: Mapping[str, RunningApplication], application: str, deployment: str
) -> ReplicaPool:
    found = applications.get(application, RunningApplication())
    return found.deployments.get(deployment, ReplicaPool())


def _running_applications() -> dict[str, RunningApplication]:
    details = query_serve_details()
    return {} if details is None else {name: _application(app) for name, app in details.applications.items()}


def _application(details: ApplicationDetails) -> RunningApplication:
    config = details.deployed_app_config
    return RunningApplication(
        import_path="" if config is None else config.import_path,
        args={} if config is None else config.args,
        status=details.status.value,
        deployed_at=details.last_deployed_time_s,
        deployments={name: _pool(deployment) for name, deployment in details.deployments.items()},
    )


def _pool(details: DeploymentDetails) -> ReplicaPool:
    scaling = details.deployment_config.autoscaling_config
    return ReplicaPool(
        details.status.value,
        running=sum(replica.state == "RUNNING" for replica in details.replicas),
        message=details.message,
        limit=details.target_num_replicas if not isinstance(scaling, dict) else scaling.get("max_replicas"),
    )
