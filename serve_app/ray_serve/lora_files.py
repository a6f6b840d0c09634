"""The Serve deployment class that hands registered LoRA files to model replicas and removes unused files."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Mapping
from typing import Any

import ray.exceptions
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import Internal, ModelUnavailable, NotFound, WeftError
from deployments.protocol.log_context import join_serve_log
from serve_app.loras.builtin import BuiltInLoras
from serve_app.ray_serve.model_client import ModelClient
from serve_app.ray_serve.served_models import ServedModels
from serve_app.redis.cancellation import raise_if_cancelled
from serve_app.services import Services
from serve_app.settings import Settings
from serve_app.storage.results import adapter_path

LORA_FILES = "Adapters"  # name of the deployment
COLLECT_EVERY_S = 600.0

logger = logging.getLogger(__name__)


class LoraFilesReplica:
    """The files of all registered LoRAs, by digest: model replicas have no access to storage or Valkey."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it: the task below runs on the replica's loop
        self, settings: Settings, cards: Mapping[str, ModelCard] | None
    ) -> None:
        """cards: those of its application; None: models are applications of their own."""
        join_serve_log("serve_app")
        services = Services.open(settings)
        self._results = services.results
        self._served = ServedModels.of_replica(cards)
        self._builtins = BuiltInLoras(self._served.cards.values())
        self._loras = services.lora_service(self._builtins, ModelClient(self._served).unload)
        # a task with the context of a Serve request would be cancelled with that request
        self._collecting = asyncio.create_task(self._collect(), context=contextvars.Context())

    async def read(self, digest: str) -> bytes:
        """The safetensors file with this SHA-256. Raises NotFound."""
        if self._served.cards_are_dynamic:
            await self._served.refresh()
        file = await self._builtins.file(digest)
        return await self._results.get(adapter_path(digest), sha256=digest) if file is None else file

    def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this raises."""
        if self._collecting.done():
            raise Internal("the loop that removes unused LoRA files has ended")

    async def _collect(self) -> None:
        while True:
            try:
                removed = await self._loras.collect_all()
                if removed:
                    logger.info("unused LoRA files removed", extra={"files": removed})
            except (WeftError, OSError) as error:  # Valkey or the storage is unavailable: try again later
                logger.warning("unused LoRA files were not removed", extra={"error": str(error)})
            raise_if_cancelled()
            await asyncio.sleep(COLLECT_EVERY_S)


class LoraFileClient:
    """The LoraFileReader of a model replica: calls LoraFilesReplica.read."""

    def __init__(self, application: str | None = None) -> None:
        """application: the one with LoraFilesReplica; None: the model replica's own."""
        self._application = application
        self._handle: DeploymentHandle[Any] | None = None

    async def read(self, digest: str) -> bytes:
        """The safetensors file with this SHA-256.

        Raises NotFound; ModelUnavailable (retryable) while the deployment is unavailable.
        """
        try:
            if self._handle is None:
                self._handle = await asyncio.to_thread(
                    serve.get_deployment_handle, LORA_FILES, self._application
                )
            file: bytes = await self._handle.read.remote(digest)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, NotFound):
                raise NotFound(
                    "a LoRA's file is no longer stored; register it again", param="loras"
                ) from error
            raise ModelUnavailable("a LoRA's file could not be read; try again") from error
        except (ray.exceptions.RayActorError, RayServeException, KeyError) as error:
            raise ModelUnavailable("LoRA files are unavailable; try again") from error
        return file
