"""Files of LoRAs that come with a request, from a URL or from the hub: fetched, inspected, stored and
held."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from contextlib import AsyncExitStack

from deployments.lora_format.file_info import LoraFileInfo, inspect_lora
from deployments.protocol.errors import BadRequest, Forbidden, Overloaded, TooLarge
from serve_app.loras.hub import fetch_from_hub
from serve_app.loras.registry import LoraRegistry
from serve_app.loras.spec import LoraSpec
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore, adapter_path
from serve_app.storage.url_fetcher import FetchedFile, UrlFetcher

MAX_CONCURRENT = 2  # files at once; each may take max_adapter_bytes of memory, twice

logger = logging.getLogger(__name__)


class LoraIntake:
    """Takes in a few files at a time."""

    def __init__(
        self,
        registry: LoraRegistry,
        results: ResultStore,
        settings: Settings,
        *,
        fetcher: UrlFetcher,
        hub: UrlFetcher,
    ) -> None:
        """fetcher: of URLs. hub: of hub ids; disabled where the operator does not allow them."""
        self._registry = registry
        self._results = results
        self._settings = settings
        self._fetcher = fetcher
        self._hub = hub
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)

    async def take_in(self, spec: LoraSpec, holds: AsyncExitStack) -> tuple[str, LoraFileInfo]:
        """SHA-256 (hex) and info of the file, which is stored, and held until `holds` closes.

        spec: of any kind but "id". Raises Overloaded where disk space is short, TooLarge, BadRequest for a
        file that is no LoRA, Forbidden for a hub id where the hub is disabled, and what UrlFetcher.get
        raises.
        """
        if not await self._results.free_space_ok():
            raise Overloaded(
                "there is not enough disk space for another LoRA; try again later", retry_after_s=60
            )
        async with self._slots:
            file = await self._read(spec)
            if len(file) > self._settings.max_adapter_bytes:
                raise TooLarge(
                    f"the LoRA has {len(file)} bytes; at most {self._settings.max_adapter_bytes}",
                    param=spec.param,
                )
            try:
                info = await asyncio.to_thread(inspect_lora, file)
            except BadRequest as error:
                raise BadRequest(error.message, param=spec.param) from None
            digest = await asyncio.to_thread(lambda: hashlib.sha256(file).hexdigest())
            await holds.enter_async_context(self._registry.hold(digest))
            if not await self._results.has(adapter_path(digest)):
                await self._results.put(adapter_path(digest), file)
        return digest, info

    async def _read(self, spec: LoraSpec) -> bytes:
        if spec.kind == "file":
            assert spec.file is not None, "a spec of this kind has a file"
            return spec.file
        fetched = await (self._from_url(spec) if spec.kind == "url" else self._from_hub(spec))
        logger.info("LoRA file fetched", extra={"size_bytes": len(fetched.data), "digest": fetched.sha256})
        return fetched.data

    async def _from_url(self, spec: LoraSpec) -> FetchedFile:
        return await self._fetcher.get(
            spec.reference,
            max_bytes=self._settings.max_adapter_bytes,
            timeout_s=self._settings.fetch_timeout_s,
        )

    async def _from_hub(self, spec: LoraSpec) -> FetchedFile:
        if not self._hub.enabled:
            raise Forbidden(
                "this service fetches nothing from the hub; its operator may set WEFT_HUB_LORAS",
                param=spec.param,
            )
        token = self._settings.hf_token
        return await fetch_from_hub(
            self._hub,
            spec.reference,
            None if token is None else token.get_secret_value(),
            max_bytes=self._settings.max_adapter_bytes,
            timeout_s=self._settings.fetch_timeout_s,
        )
