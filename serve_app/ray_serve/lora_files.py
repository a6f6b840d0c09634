"""Adapters: the Serve shell that hands registered LoRA files to replicas, and clears away forgotten ones."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ray.exceptions
from ray import serve
from ray.serve.exceptions import RayServeException

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import Internal, ModelUnavailable, NotFound, WeftError
from serve_app.loras.builtin import BuiltInLoras
from serve_app.observability.metrics import join_serve_log
from serve_app.ray_serve.model_client import ModelClient
from serve_app.services import Services
from serve_app.settings import Settings
from serve_app.storage.results import adapter_path

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

LORA_FILES = "Adapters"  # the deployment's name
COLLECT_EVERY_S = 600.0

logger = logging.getLogger(__name__)


class LoraFilesReplica:
    """The files of all registered adapters, by digest: replicas of models see no storage and no Valkey."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it, so that the loop below is the replica's
        self, settings: Settings, cards: Mapping[str, ModelCard] | None
    ) -> None:
        """cards: what its application serves; None: models are applications of their own."""
        join_serve_log()
        services = Services.open(settings)
        self._results = services.results
        self._models = ModelClient.of_replica(cards)
        self._builtins = BuiltInLoras(self._models.cards.values())
        self._loras = services.lora_service(self._builtins, self._models.unload)
        # a task with the context of a Serve request would be cancelled with that request
        self._task = asyncio.create_task(self._collect(), context=contextvars.Context())

    async def read(self, digest: str) -> bytes:
        """The safetensors file with this SHA-256. Raises NotFound."""
        if self._models.cards_are_dynamic:
            await self._models.refresh()
        file = await self._builtins.file(digest)
        return await self._results.get(adapter_path(digest), sha256=digest) if file is None else file

    def check_health(self) -> None:
        """Called by Serve; raising has the replica replaced."""
        if self._task.done():
            raise Internal("the loop that clears away adapters has ended")

    async def _collect(self) -> None:
        while True:
            try:
                removed = await self._loras.collect_all()
                if removed:
                    logger.info("forgotten adapters removed", extra={"files": removed})
            except (WeftError, OSError) as error:  # the store or the medium is away: next time
                logger.warning("adapters could not be cleared away", extra={"error": str(error)})
            await asyncio.sleep(COLLECT_EVERY_S)


class LoraFileClient:
    """The LoraFileReader that a replica of a model gets: calls to the deployment above."""

    def __init__(self, application: str | None = None) -> None:
        """application: where that deployment is; None: in the replica's own."""
        self._application = application
        self._adapters: DeploymentHandle[Any] | None = None

    async def read(self, digest: str) -> bytes:
        """Raises NotFound; ModelUnavailable (retryable) while the deployment is away."""
        try:
            if self._adapters is None:
                self._adapters = await asyncio.to_thread(
                    serve.get_deployment_handle, LORA_FILES, self._application
                )
            file: bytes = await self._adapters.read.remote(digest)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, NotFound):
                raise NotFound(
                    "a LoRA's file is no longer stored; register it again", param="loras"
                ) from error
            raise ModelUnavailable("a LoRA's file could not be read; try again") from error
        except (ray.exceptions.RayActorError, RayServeException, KeyError) as error:
            raise ModelUnavailable("the store of LoRA files is away; try again") from error
        return file
