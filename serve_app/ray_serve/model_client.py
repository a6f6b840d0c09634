"""The workshop as the front floor sees it: card id -> Serve handle, events, Serve's errors in our words."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import suppress
from typing import Any, cast

import ray.exceptions
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.schema import ApplicationDetails, DeploymentDetails, ServeInstanceDetails

from deployments.protocol import log_context
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import Internal, ModelUnavailable
from deployments.protocol.events import Event, Failed
from deployments.protocol.request import ResolvedRequest
from serve_app.jobs.store.start_estimate import Demand
from serve_app.ray_serve import autoscaling
from serve_app.ray_serve.routing import (
    FleetRoutes,
    ModelRoute,
    ReplicaPool,
    RouteTable,
    RunningApplication,
    ServedCards,
    SingleApplicationRoutes,
)

logger = logging.getLogger(__name__)

STATES_MAX_AGE_S = 2.0
REFRESH_TIMEOUT_S = 5.0  # that a caller waits for Serve's controller; then what was seen last counts
UNLOAD_TIMEOUT_S = 30.0
LAYER_SHAPES_TIMEOUT_S = 2.0  # that a request waits to have its LoRAs' shapes compared before it is accepted
WAKE_S = 10.0  # that a policy has to start a sleeping model that jobs wait for
PUBLISH_EVERY_S = 10.0  # what has not changed


class ModelClient:
    """Calls to the models that are served. One per replica of the front floor, used from one event loop."""

    def __init__(self, served: RouteTable, application: str = "", deployment: str = "") -> None:
        """application, deployment: whose replica we are."""
        self._served = served
        self._own = application, deployment
        self.peer_count: int | None = None  # replicas that our deployment shall have, with us; None: not seen
        # the first .options() opens a metrics pusher and a long poll; those made of its result share them
        self._models: dict[tuple[str, str], DeploymentHandle[Any]] = {}
        self._pools: dict[str, ReplicaPool] = {}  # by model, as last seen; cards of one group share theirs
        self._refreshed_at = -math.inf
        self._refreshing: asyncio.Task[None] | None = None
        self._refresh_started = -math.inf

    @classmethod
    def of_replica(cls, cards: Mapping[str, ModelCard] | None) -> ModelClient:
        """For the replica we are in. cards: what its application serves; None: a gateway, see Fleet."""
        own = serve.get_replica_context()
        served = FleetRoutes(own.app_name) if cards is None else SingleApplicationRoutes(cards, own.app_name)
        return cls(served, own.app_name, own.deployment)

    @property
    def cards(self) -> ServedCards:
        """Of the models that are served, as last seen; they may change whenever somebody awaits."""
        return ServedCards(self._served)

    @property
    def cards_are_dynamic(self) -> bool:
        """Whether models may come and go."""
        return self._served.dynamic

    async def generate(
        self, model: str, request: ResolvedRequest, /, *, user: str = "", resume: bytes | None = None
    ) -> AsyncGenerator[Event]:
        """The events of one request. Closing the iterator cancels it on its replica.

        It waits for a slot as long as that takes: the request was accepted and has its place.
        Raises ModelUnavailable (retryable) when the replica dies, drains or does not exist.
        """
        route = self._served.routes.get(model)
        if route is None:
            raise ModelUnavailable(f"{model} is not served now; there is {', '.join(self.cards) or 'none'}")
        call = self._handle_for(route, request).remote(
            request, user, resume, unlimited_wait=True, log_context=log_context.current()
        )
        stream = cast(DeploymentResponseGenerator[Event], call)
        try:
            async for event in stream:
                if isinstance(event, Failed) and (event.kind, event.param) == ("not_found", "model"):
                    raise self._replica_lost(model)  # its deployment was changed and serves others now
                yield event
        except (ray.exceptions.RayActorError, RayServeException) as error:
            raise self._replica_lost(model) from error
        except ray.exceptions.RayTaskError as error:
            raise Internal(f"the replica of {model} failed: {error.cause!r}") from error
        finally:
            # closing a Python iterator tells the replica nothing; cancel() does, and is a no-op at the end
            stream.cancel()  # type: ignore[no-untyped-call]

    def _replica_lost(self, model: str) -> ModelUnavailable:
        if self._served.dynamic:
            self._refreshed_at = -math.inf  # perhaps it is not served any more: look before it is tried again
            self.poll()
        return ModelUnavailable(f"the replica of {model} was lost; try again")

    def _handle_for(self, route: ModelRoute, request: ResolvedRequest) -> DeploymentHandle[Any]:
        """With LoRAs: to a replica that holds the first of them, if there is one."""
        if not request.loras or route.loras is None:
            return self._handle(route.application, route.deployment)
        handle = self._handle(route.application, route.loras)
        return handle.options(multiplexed_model_id=request.loras[0].id) if route.routed_by_lora else handle

    def _handle(self, application: str, deployment: str) -> DeploymentHandle[Any]:
        """Kept for good: it serves again when an application of this name comes back."""
        handle = self._models.get((application, deployment))
        if handle is None:
            # the check would hold up the event loop for a call to the controller
            found = serve.get_deployment_handle(deployment, application, _check_exists=False)
            handle = found.options(method_name="generate", stream=True)
            self._models[application, deployment] = handle
        return handle

    async def states(self) -> dict[str, str]:
        """Per model: ready, loading, idle (scaled to zero) or error; at most 2 s old."""
        await self.refresh()
        return {model: _state(self._pool(model)) for model in self._served.routes}

    def running_replicas(self, model: str) -> int:
        """As last seen; `look_again` brings it up to date."""
        return self._pool(model).running

    def max_replicas(self, model: str) -> int:
        """How many there may be, as last seen: a config file may say otherwise than the card."""
        limit = self._pool(model).limit
        return self._served.routes[model].card.serving.max_replicas if limit is None else limit

    def starting(self, model: str) -> bool:
        """Whether its first replica is on the way, as last seen."""
        pool = self._pool(model)
        return not pool.running and _state(pool) == "loading"

    def deployment_of(self, model: str) -> tuple[str, str] | None:
        """Application and deployment that serve it, None if none does."""
        route = self._served.routes.get(model)
        return None if route is None else (route.application, route.deployment)

    def _pool(self, model: str) -> ReplicaPool:
        return self._pools.get(model, ReplicaPool())

    async def refresh(self) -> None:
        """Know what Serve says, at most 2 s old; while its controller is silent, what it said last."""
        self.poll()
        if self._refreshing is not None and not self._refreshing.done():
            patience_s = self._refresh_started + REFRESH_TIMEOUT_S - time.monotonic()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, patience_s)):
                    await asyncio.shield(self._refreshing)

    def poll(self) -> None:
        """Ask Serve in the background, if the last answer is over 2 s old: it costs 20 ms of CPU."""
        now = time.monotonic()
        if now - self._refreshed_at > STATES_MAX_AGE_S and (
            self._refreshing is None or self._refreshing.done()
        ):
            self._refresh_started = now
            # with the context of a Serve request it could be cancelled with that request
            self._refreshing = asyncio.get_running_loop().create_task(
                self._query_serve(), context=contextvars.Context()
            )

    async def _query_serve(self) -> None:
        try:
            applications = await asyncio.to_thread(_applications)
        except (ray.exceptions.RayError, RayServeException) as error:
            logger.warning("serve's status is not to be had", extra={"error": repr(error)})
            return
        self._served.update(applications)
        application, deployment = self._own
        own = applications.get(application, RunningApplication()).deployments.get(deployment, ReplicaPool())
        self.peer_count = own.limit
        for model, route in self._served.routes.items():
            pools = applications.get(route.application, RunningApplication()).deployments
            self._pools[model] = pools.get(route.deployment, ReplicaPool())
        self._refreshed_at = time.monotonic()

    async def layer_shapes(self, model: str) -> Mapping[str, tuple[int, ...]] | None:
        """Shapes of the layers that a LoRA may change; None while no replica is there, or none has time."""
        route = self._served.routes.get(model)
        await self.refresh()
        if route is None or not self.running_replicas(model):
            return None
        handle = self._handle(route.application, route.deployment)
        call = handle.options(method_name="layers", stream=False).remote(model)
        try:
            async with asyncio.timeout(LAYER_SHAPES_TIMEOUT_S):
                shapes: Mapping[str, tuple[int, ...]] = await call
        except (ray.exceptions.RayError, RayServeException, TimeoutError) as error:
            call.cancel()  # type: ignore[no-untyped-call]
            logger.info("a model did not tell its layers", extra={"model": model, "error": repr(error)})
            return None
        return shapes

    async def unload(self, digest: str) -> None:
        """Have every replica forget an adapter. One that is missed keeps a file that nobody asks for."""
        await self.refresh()
        pools = {(route.application, route.loras) for route in self._served.routes.values() if route.loras}
        for application, deployment in pools:
            try:
                await asyncio.to_thread(_unload, application, deployment, digest)
            except (ray.exceptions.RayError, RayServeException, KeyError, TimeoutError) as error:
                about = {"deployment": deployment, "error": repr(error)}
                logger.warning("an adapter was not unloaded everywhere", extra=about)


def _unload(application: str, deployment: str, digest: str) -> None:
    serve.get_deployment_handle(deployment, application).broadcast("unload", digest).results(
        timeout_s=UNLOAD_TIMEOUT_S
    )


def _applications() -> dict[str, RunningApplication]:
    """What runs, by name. `serve.status()` is made of the same answer, less the args."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return {}
    details = ServeInstanceDetails(**client.get_serve_details())
    return {name: _application(app) for name, app in details.applications.items()}


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
    config = details.deployment_config
    scaled = config.autoscaling_config
    return ReplicaPool(
        details.status.value,
        running=sum(replica.state == "RUNNING" for replica in details.replicas),
        limit=details.target_num_replicas if not isinstance(scaled, dict) else scaled.get("max_replicas"),
    )


def _state(pool: ReplicaPool) -> str:
    if pool.running:
        return "ready"
    if pool.status in ("UNHEALTHY", "DEPLOY_FAILED"):
        return "error"
    return "idle" if pool.status == "HEALTHY" else "loading"


class CapacityTracker:
    """What a dispatcher may ask of the models: how many more jobs, and to run one."""

    def __init__(self, handles: ModelClient, dispatchers: int) -> None:
        """dispatchers: how many share the models, until Serve has told."""
        self._models = handles
        self._dispatchers = dispatchers
        self._running: Counter[str] = Counter()
        self._asleep_since: dict[str, float] = {}  # models that jobs wait for and no replica serves
        self._published: dict[tuple[str, str], tuple[Demand, float]] = {}  # by deployment: what, and when

    def free_slots(self) -> Mapping[str, int]:
        """Per model, how many more jobs this dispatcher may give it.

        One replica more than runs: the surplus waits at Serve, where Ray's own policy could see it. None
        while ours shall say how many a sleeping model starts: as soon as a request is at Serve, Serve itself
        says one, until that runs.
        """
        free: dict[str, int] = {}
        if self._models.cards_are_dynamic or self._models.peer_count is None:
            self._models.poll()
        dispatchers = self._models.peer_count or self._dispatchers
        for model, card in self._models.cards.items():
            limit = self._models.max_replicas(model)
            replicas = min(self._models.running_replicas(model) + 1, limit)
            if self._wakes(model, limit):
                free[model] = 0
                continue
            share = math.ceil(card.serving.slots * replicas / dispatchers)
            free[model] = max(0, share - self._running[model])
            if replicas < limit and free[model] < share / 2:
                self._models.poll()  # only when room runs short does the number matter
        return free

    def _wakes(self, model: str, limit: int) -> bool:
        if limit < 2 or self._models.running_replicas(model):
            return False
        since = self._asleep_since.get(model)
        if since is None:  # it has not been told yet that somebody waits
            return True
        self._models.poll()
        # a policy that does not hear us must not let jobs wait for ever
        return time.monotonic() - since < WAKE_S or self._models.starting(model)

    async def report_demand(self, demand: Mapping[str, Demand]) -> None:
        """Leave word for the policies that scale the models, one for each deployment."""
        now = time.monotonic()
        totals: dict[tuple[str, str], Demand] = {}
        for model, of_model in demand.items():
            if (route := self._models.deployment_of(model)) is not None:
                totals[route] = totals.get(route, Demand()) + of_model
            if of_model.waiting and not self._models.running_replicas(model):
                self._asleep_since.setdefault(model, now)
            else:
                self._asleep_since.pop(model, None)
        for route, total in totals.items():
            before, published_at = self._published.get(route, (None, -math.inf))
            if total == before and (now - published_at < PUBLISH_EVERY_S or total == Demand()):
                continue
            try:
                await asyncio.to_thread(autoscaling.publish_demand, *route, total.waiting, total.running)
            except ray.exceptions.RayError as error:
                logger.warning("the demand could not be told", extra={"error": repr(error)})
                return
            self._published[route] = total, now

    async def generate(
        self, model: str, request: ResolvedRequest, /, *, user: str = "", resume: bytes | None = None
    ) -> AsyncGenerator[Event]:
        self._running[model] += 1
        try:
            events = self._models.generate(model, request, user=user, resume=resume)
            try:
                async for event in events:
                    yield event
            finally:
                await events.aclose()
        finally:
            self._running[model] -= 1


class JobTimeLimits(Mapping[str, float]):
    """Seconds that a job of each served model may take, as models come and go."""

    def __init__(self, cards: Mapping[str, ModelCard]) -> None:
        self._cards = cards

    def __getitem__(self, model: str) -> float:
        return self._cards[model].serving.job_timeout_s

    def __iter__(self) -> Iterator[str]:
        return iter(self._cards)

    def __len__(self) -> int:
        return len(self._cards)
