"""The workshop as the front floor sees it: card id -> Serve handle, events, Serve's errors in our words."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, cast

import ray.exceptions
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import Internal, ModelUnavailable
from deployments.protocol.events import Event
from deployments.protocol.request import FittedRequest

logger = logging.getLogger(__name__)

STATES_MAX_AGE_S = 2.0
UNLOAD_TIMEOUT_S = 30.0


class ModelHandles:
    """Calls to the models of one application. One per replica, used from one event loop."""

    def __init__(
        self,
        handles: Mapping[str, DeploymentHandle[Any]],
        app_name: str,
        loras: Mapping[str, DeploymentHandle[Any]] | None = None,
    ) -> None:
        """loras: by model, where its requests with LoRAs go; may be the same deployment."""
        # the first .options() opens a metrics pusher and a long poll; those made of its result share them
        self._handles = {
            model: handle.options(method_name="generate", stream=True) for model, handle in handles.items()
        }
        self._loras = {
            model: self._handles[model]
            if handle.deployment_name == handles[model].deployment_name
            else handle.options(method_name="generate", stream=True)
            for model, handle in (loras or {}).items()
        }
        self._app_name = app_name
        self._running = dict.fromkeys(handles, 0)  # replicas
        self._states = dict.fromkeys(handles, "loading")
        self._looked_at = -math.inf
        self._look: asyncio.Task[None] | None = None

    async def generate(
        self, model: str, request: FittedRequest, /, *, user: str = "", resume: bytes | None = None
    ) -> AsyncGenerator[Event]:
        """The events of one request. Closing the iterator cancels it on its replica.

        It waits for a slot as long as that takes: the request was accepted and has its place.
        Raises ModelUnavailable (retryable) when the replica dies, drains or does not exist.
        """
        call = self._handle_for(model, request).remote(request, user, resume, patient=True)
        stream = cast(DeploymentResponseGenerator[Event], call)
        try:
            async for event in stream:
                yield event
        except (ray.exceptions.RayActorError, RayServeException) as error:
            raise ModelUnavailable(f"the replica of {model} was lost; try again") from error
        except ray.exceptions.RayTaskError as error:
            raise Internal(f"the replica of {model} failed: {error.cause!r}") from error
        finally:
            # closing a Python iterator tells the replica nothing; cancel() does, and is a no-op at the end
            stream.cancel()  # type: ignore[no-untyped-call]

    def _handle_for(self, model: str, request: FittedRequest) -> DeploymentHandle[Any]:
        """With LoRAs: to a replica that holds the first of them, if there is one."""
        if not request.loras or model not in self._loras:
            return self._handles[model]
        return self._loras[model].options(multiplexed_model_id=request.loras[0].id)

    async def states(self) -> dict[str, str]:
        """Per model: ready, loading, idle (scaled to zero) or error; at most 2 s old."""
        if time.monotonic() - self._looked_at > STATES_MAX_AGE_S:
            await self._refresh()
        return dict(self._states)

    def running_replicas(self, model: str) -> int:
        """As last seen; `look_again` brings it up to date."""
        return self._running[model]

    def look_again(self) -> None:
        """Ask Serve in the background, if the last answer is over 2 s old: it costs 20 ms of CPU."""
        aged = time.monotonic() - self._looked_at > STATES_MAX_AGE_S
        if aged and (self._look is None or self._look.done()):
            self._look = asyncio.get_running_loop().create_task(self._refresh())

    async def _refresh(self) -> None:
        try:
            status = await asyncio.to_thread(serve.status)
        except (ray.exceptions.RayError, RayServeException) as error:
            logger.warning("serve's status is not to be had", extra={"error": repr(error)})
            return
        application = status.applications.get(self._app_name)
        deployments = application.deployments if application is not None else {}
        for model, handle in self._handles.items():
            found = deployments.get(handle.deployment_name)  # cards of one group share theirs
            self._running[model] = _running(found.replica_states) if found else 0
            self._states[model] = _state(self._running[model], found.status.value if found else "")
        self._looked_at = time.monotonic()


class LoraReplicas:
    """All replicas that may hold adapters."""

    def __init__(self, deployments: Sequence[str], app_name: str) -> None:
        self._deployments = tuple(deployments)
        self._app_name = app_name
        self._handles: list[DeploymentHandle[Any]] | None = None  # made when needed: replicas come later

    async def unload(self, digest: str) -> None:
        """Have every replica forget an adapter. One that is missed keeps a file that nobody asks for."""
        try:
            await asyncio.to_thread(self._unload, digest)
        except (ray.exceptions.RayError, RayServeException, TimeoutError) as error:
            logger.warning("an adapter was not unloaded everywhere", extra={"error": repr(error)})

    def _unload(self, digest: str) -> None:
        if self._handles is None:
            self._handles = [serve.get_deployment_handle(name, self._app_name) for name in self._deployments]
        for call in [handle.broadcast("unload", digest) for handle in self._handles]:
            call.results(timeout_s=UNLOAD_TIMEOUT_S)


def _running(replica_states: Mapping[Any, int]) -> int:
    return sum(count for state, count in replica_states.items() if state == "RUNNING")


def _state(running: int, serve_status: str) -> str:
    if running:
        return "ready"
    if serve_status in ("UNHEALTHY", "DEPLOY_FAILED"):
        return "error"
    return "idle" if serve_status == "HEALTHY" else "loading"


class DispatcherModels:
    """What a dispatcher may ask of the models: how many more jobs, and to run one."""

    def __init__(self, handles: ModelHandles, cards: Mapping[str, ModelCard], dispatchers: int) -> None:
        self._handles = handles
        self._cards = cards
        self._dispatchers = dispatchers
        self._active = dict.fromkeys(cards, 0)

    def free_slots(self) -> Mapping[str, int]:
        """Per model, how many more jobs this dispatcher may give it.

        One replica more than runs: the surplus waits at Serve, where its autoscaler can see it.
        """
        free: dict[str, int] = {}
        for model, card in self._cards.items():
            serving = card.serving
            replicas = min(self._handles.running_replicas(model) + 1, serving.max_replicas)
            share = math.ceil(serving.slots * replicas / self._dispatchers)
            free[model] = max(0, share - self._active[model])
            if replicas < serving.max_replicas and free[model] < share / 2:
                self._handles.look_again()  # only when room runs short does the number matter
        return free

    async def generate(
        self, model: str, request: FittedRequest, /, *, user: str = "", resume: bytes | None = None
    ) -> AsyncGenerator[Event]:
        self._active[model] += 1
        try:
            events = self._handles.generate(model, request, user=user, resume=resume)
            try:
                async for event in events:
                    yield event
            finally:
                await events.aclose()
        finally:
            self._active[model] -= 1
