"""Files of LoRAs that come with a request, from a URL or from the hub: fetched, inspected, stored and
held."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from contextlib import AsyncExitStack

from deployments.lora_format.file_info import LoraFileInfo, inspect_lora
from deployments.protocol.errors import BadRequest, Forbidden, Overloaded, TooLarge
from serve_app.admission.fair_slots import FairSlots
from serve_app.loras.hub import download_from_hub
from serve_app.loras.registry import LoraRegistry
from serve_app.loras.spec import LoraSpec
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore, adapter_path
from serve_app.storage.spooled_file import SpooledFile
from serve_app.storage.url_fetcher import UrlFetcher

FETCHES, FETCHES_PER_OWNER = 16, 2  # at once; they cost a connection and disk space
CHECKS, CHECKS_PER_OWNER = 2, 1  # files read at once, each up to max_adapter_bytes
WAIT_S = 60.0  # for either

logger = logging.getLogger(__name__)


class LoraIntake:
    """Takes in files. What waits for the network or a disk holds no place of those that are checked, and one
    owner's files leave places for the others'.
    """

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
        self._fetches = FairSlots(FETCHES, FETCHES_PER_OWNER, WAIT_S, "downloads of LoRAs")
        self._checks = FairSlots(CHECKS, CHECKS_PER_OWNER, WAIT_S, "checks of LoRA files")

    async def take_in(self, spec: LoraSpec, owner: str, holds: AsyncExitStack) -> tuple[str, LoraFileInfo]:
        """SHA-256 (hex) and info of the file, which is stored, and held until `holds` closes.

        spec: of any kind but "id". Raises Overloaded where disk space or places are short, TooLarge,
        BadRequest for a file that is no LoRA, Forbidden for a hub id where the hub is disabled, and what
        UrlFetcher.download raises.
        """
        if not await self._results.free_space_ok():
            raise Overloaded(
                "there is not enough disk space for another LoRA; try again later", retry_after_s=60
            )
        with await asyncio.to_thread(_opened, spec.file) as file:
            if spec.file is None:
                async with self._fetches.hold(owner):
                    await self._fetch(spec, file)
            size_bytes = file.size_bytes
            if size_bytes > self._settings.max_adapter_bytes:
                raise TooLarge(
                    f"the LoRA has {size_bytes} bytes; at most {self._settings.max_adapter_bytes}",
                    param=spec.param,
                )
            async with self._checks.hold(owner):
                try:
                    digest, info = await asyncio.to_thread(_inspected, file)
                except BadRequest as error:
                    raise BadRequest(error.message, param=spec.param) from None
                await holds.enter_async_context(self._registry.hold(digest))
                if not await self._results.has(adapter_path(digest)):
                    with file.mapped() as content:
                        await self._results.put(adapter_path(digest), content)
        return digest, info

    async def _fetch(self, spec: LoraSpec, file: SpooledFile) -> None:
        """Write the file that the spec names."""
        if spec.kind == "url":
            await self._fetcher.download(
                spec.reference,
                file.write,
                max_bytes=self._settings.max_adapter_bytes,
                timeout_s=self._settings.fetch_timeout_s,
            )
        else:
            await self._from_hub(spec, file)
        await file.flush()
        logger.info("LoRA file fetched", extra={"size_bytes": file.size_bytes})

    async def _from_hub(self, spec: LoraSpec, file: SpooledFile) -> None:
        if not self._hub.enabled:
            raise Forbidden(
                "this service fetches nothing from the hub; its operator may set WEFT_HUB_LORAS",
                param=spec.param,
            )
        token = self._settings.hf_token
        await download_from_hub(
            self._hub,
            spec.reference,
            None if token is None else token.get_secret_value(),
            file.write,
            max_bytes=self._settings.max_adapter_bytes,
            timeout_s=self._settings.fetch_timeout_s,
        )


def _opened(file: bytes | SpooledFile | None) -> SpooledFile:
    """The file to read or to write to. Blocks."""
    if file is None:
        return SpooledFile()
    return SpooledFile.of(file) if isinstance(file, bytes) else file


def _inspected(file: SpooledFile) -> tuple[str, LoraFileInfo]:
    with file.mapped() as content:
        info = inspect_lora(content)
        return hashlib.sha256(content).hexdigest(), info
