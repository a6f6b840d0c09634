"""Calls to the models through Serve handles; errors of Serve become those of protocol/errors.py."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, cast

import ray.exceptions
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from deployments.protocol import log_context
from deployments.protocol.errors import Internal, ModelFailed, ModelUnavailable, NodeLost
from deployments.protocol.events import CheckpointPolicy, Event, Failed
from deployments.protocol.request import ResolvedRequest
from serve_app.loras.model_layers import stored_layer_shapes
from serve_app.ray_serve.private_api import unchecked_handle
from serve_app.ray_serve.replica_reports import ProofReport
from serve_app.ray_serve.routing import ModelRoute, last_lines
from serve_app.ray_serve.served_models import ServedModels

UNLOAD_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 2.0  # that a call waits for a replica's layer shapes, before a job is accepted, or proofs
WATCH_EVERY_S = 2.0  # a request that waits for its first event
GIVEN_UP_S = 4.0  # until a request fails whose deployment Serve has given up, so that two reports say so
FAILING_S = 120.0  # until it fails where Serve goes on trying
NO_NODE_S = 600.0  # until it fails where no node has the resources: an autoscaler may bring one

# Ray's sentence about an actor whose node has ended
NODE_DIED = re.compile(r"\bits node has died|\bnode (was|is) (terminated|dead|preempted)", re.IGNORECASE)

logger = logging.getLogger(__name__)


class ModelClient:
    """Calls to the served models. One per replica, used from one event loop."""

    def __init__(self, served: ServedModels, checkpoints: CheckpointPolicy | None = None) -> None:
        """checkpoints: have the state of running requests among their events."""
        self._served = served
        self._checkpoints = checkpoints
        # the first .options() opens a metrics pusher and a long poll; handles made of its result share them
        self._handles: dict[tuple[str, str], DeploymentHandle[Any]] = {}  # by application and deployment

    async def generate(
        self, model: str, request: ResolvedRequest, /, *, user: str = "", resume: bytes | None = None
    ) -> AsyncGenerator[Event]:
        """The events of one request. Closing the iterator cancels the request on its replica.

        It waits for a slot without a limit, since the job was accepted.
        Raises ModelUnavailable (retryable) when the replica dies, drains or does not exist; NodeLost when
        that is because of its node.
        """
        route = self._served.routes.get(model)
        if route is None:
            names = ", ".join(self._served.cards) or "none"
            raise ModelUnavailable(f"{model} is not served now; there is {names}")
        call = self._handle_for(route, request).remote(
            request,
            user,
            resume,
            unlimited_wait=True,
            log_context=log_context.current(),
            checkpoints=self._checkpoints,
        )
        stream = cast(DeploymentResponseGenerator[Event], call)
        try:
            async for event in self._begun(model, stream):
                if isinstance(event, Failed) and (event.kind, event.param) == ("not_found", "model"):
                    raise self._replica_lost(model)  # its deployment was changed and serves other models now
                yield event
        except (
            ray.exceptions.RayActorError,
            ray.exceptions.ObjectLostError,
            RayServeException,
        ) as error:
            raise self._replica_lost(model, node_lost=is_node_lost(error)) from error
        except ray.exceptions.RayTaskError as error:
            raise Internal(f"the replica of {model} failed: {error.cause!r}") from error
        finally:
            # closing the Python iterator does not reach the replica; cancel() does, and is a no-op at the end
            stream.cancel()  # type: ignore[no-untyped-call]

    async def _begun(self, model: str, stream: DeploymentResponseGenerator[Event]) -> AsyncGenerator[Event]:
        """The events. Raises ModelFailed when Serve has no replica to begin with, and gets none to start."""
        waiting = asyncio.ensure_future(anext(stream))
        failing_since: float | None = None
        try:
            while not waiting.done():
                await asyncio.wait({waiting}, timeout=WATCH_EVERY_S)
                await self._served.refresh()
                failing_since = self._check_startable(model, failing_since)
            yield await waiting
        except StopAsyncIteration:
            return
        finally:
            waiting.cancel()
        async for event in stream:
            yield event

    def _check_startable(self, model: str, failing_since: float | None) -> float | None:
        """Since when no replica starts (time.monotonic()); None: one runs, or may still start.

        Serve gives up on a deployment that never started, and goes on with one whose replicas have run.
        """
        pool, now = self._served.pool(model), time.monotonic()
        if pool.state != "error" and not pool.lacks_resources:
            return None
        limit_s = GIVEN_UP_S if pool.status == "DEPLOY_FAILED" else FAILING_S
        if pool.lacks_resources:
            limit_s = NO_NODE_S
        since = now if failing_since is None else failing_since
        if now - since >= limit_s:
            raise ModelFailed(f"no replica of {model} starts: {last_lines(pool.message)}")
        return since

    async def layer_shapes(self, model: str) -> Mapping[str, tuple[int, ...]] | None:
        """Shapes of the layers that a LoRA may change: by the headers of its weights, where they are in a
        folder of this machine, else as a replica reports them.

        None when no replica answers within the time limit.
        """
        await self._served.refresh()
        card = self._served.cards.get(model)
        stored = None if card is None else await asyncio.to_thread(stored_layer_shapes, card.weights)
        if stored is not None:
            return stored
        shapes: Mapping[str, tuple[int, ...]] | None = await self._ask_replica(model, "layers", model)
        return shapes

    async def proofs(self, model: str) -> Sequence[ProofReport] | None:
        """What a replica has proven of batch sizes; None when none answers within the time limit."""
        reports: Sequence[ProofReport] | None = await self._ask_replica(model, "proofs")
        return reports

    async def plans(self, model: str) -> Mapping[str, Mapping[str, object]] | None:
        """By model of a replica, how it runs there, or would; None when none answers in time."""
        plans: Mapping[str, Mapping[str, object]] | None = await self._ask_replica(model, "plans")
        return plans

    async def load_failures(self, model: str) -> Mapping[str, Mapping[str, Any]] | None:
        """By model of the same replicas, why one of these could not load it: the fields of LoadFailure.

        None when no replica answers within the time limit.
        """
        failures: Mapping[str, Mapping[str, Any]] | None = await self._ask_replica(model, "load_failures")
        return failures

    async def _ask_replica(self, model: str, method: str, *arguments: object) -> Any:
        """What the method returns on one running replica; None when none answers within ANSWER_TIMEOUT_S."""
        await self._served.refresh()
        route = self._served.routes.get(model)
        if route is None or not self._served.pool(model).running:
            return None
        handle = self._handle(route.application, route.deployment)
        call = handle.options(method_name=method, stream=False).remote(*arguments)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await call
        except (ray.exceptions.RayError, RayServeException, TimeoutError) as error:
            call.cancel()  # type: ignore[no-untyped-call]
            about = {"model": model, "method": method, "error": repr(error)}
            logger.info("a replica did not answer", extra=about)
            return None

    async def unload(self, digest: str) -> None:
        """Have every replica unload a LoRA. A replica that is missed keeps a file that no request uses."""
        await self._served.refresh()
        routes = self._served.routes.values()
        for application, deployment in {(route.application, route.loras) for route in routes if route.loras}:
            try:
                await asyncio.to_thread(_unload, application, deployment, digest)
            except (ray.exceptions.RayError, RayServeException, KeyError, TimeoutError) as error:
                about = {"deployment": deployment, "error": repr(error)}
                logger.warning("a LoRA was not unloaded from every replica", extra=about)

    def _replica_lost(self, model: str, *, node_lost: bool = False) -> ModelUnavailable:
        if self._served.cards_are_dynamic:
            self._served.poll(force=True)  # the model may be gone: find out before it is tried again
        if node_lost:
            return NodeLost(f"the node with the replica of {model} was lost; try again")
        return ModelUnavailable(f"the replica of {model} was lost; try again")

    def _handle_for(self, route: ModelRoute, request: ResolvedRequest) -> DeploymentHandle[Any]:
        """For a request with LoRAs: a handle that prefers replicas holding the first of them."""
        if not request.loras or route.loras is None:
            return self._handle(route.application, route.deployment)
        handle = self._handle(route.application, route.loras)
        return handle.options(multiplexed_model_id=request.loras[0].id) if route.routed_by_lora else handle

    def _handle(self, application: str, deployment: str) -> DeploymentHandle[Any]:
        """Kept for good: it works again when an application of this name comes back."""
        handle = self._handles.get((application, deployment))
        if handle is None:
            # Serve's own check that it exists would block the event loop
            found = unchecked_handle(deployment, application)
            handle = self._handles[application, deployment] = found.options(
                method_name="generate", stream=True
            )
        return handle


def is_node_lost(error: Exception) -> bool:
    """Whether a call failed because the node of the replica ended or cannot be reached.

    When only the replica's process ends, its node says so at once, which makes another ActorDiedError. A node
    also takes the large events with it that were still in its memory.
    """
    if isinstance(error, ray.exceptions.ActorUnavailableError | ray.exceptions.ObjectLostError):
        return True
    return isinstance(error, ray.exceptions.ActorDiedError) and (
        error.preempted or NODE_DIED.search(str(error)) is not None
    )


def _unload(application: str, deployment: str, digest: str) -> None:
    serve.get_deployment_handle(deployment, application).broadcast("unload", digest).results(
        timeout_s=UNLOAD_TIMEOUT_S
    )
