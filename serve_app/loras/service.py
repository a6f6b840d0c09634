"""The API's only door to adapters: register, look, list, delete, and find those that a request wants."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from deployments.lora_format.file_info import LoraFileInfo, inspect_lora
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest, Forbidden, NotFound, Overloaded, TooLarge
from deployments.protocol.request import Lora
from serve_app.loras.builtin import BuiltInLoras
from serve_app.loras.compatibility import CompatibilityCheck
from serve_app.loras.hub import fetch_from_hub
from serve_app.loras.record import PUBLIC, LoraLabel, LoraRecord, LoraSource, make_record
from serve_app.loras.registry import LoraRegistry
from serve_app.loras.spec import LoraSpec, check_weight
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore, adapter_path
from serve_app.storage.url_fetcher import UrlFetcher

INTAKES = 2  # files taken in at once; each may take max_adapter_bytes of memory, twice

logger = logging.getLogger(__name__)

InUse = Callable[[], Awaitable[set[str]]]  # digests that jobs which have not ended will need
Unload = Callable[[str], Awaitable[None]]  # tells every replica to forget this digest


class LoraService:
    """What owners of adapters may do. Somebody else's adapter looks like one that never was."""

    def __init__(
        self,
        registry: LoraRegistry,
        results: ResultStore,
        builtins: BuiltInLoras,
        settings: Settings,
        *,
        in_use: InUse,
        unload: Unload,
        compatibility: CompatibilityCheck,
        fetcher: UrlFetcher,
        hub: UrlFetcher,
    ) -> None:
        self._registry = registry
        self._results = results
        self._builtins = builtins
        self._settings = settings
        self._in_use = in_use
        self._unload = unload
        self._compatibility = compatibility
        self._fetcher = fetcher
        self._hub = hub
        self._intakes = asyncio.Semaphore(INTAKES)

    @asynccontextmanager
    async def resolve(
        self, specs: Sequence[LoraSpec], owner: str, card: ModelCard, again: Sequence[Lora] = ()
    ) -> AsyncIterator[tuple[Lora, ...]]:
        """The wished adapters by digest, checked and stored; none can vanish while this is open.

        again: of an earlier job of the same owner, which shall be used once more.

        Raises NotFound, BadRequest (wrong family or shape, named twice, bad file), Forbidden, TooLarge,
        Overloaded.
        """
        if specs:
            _check_count(specs, card, len(again))
        async with AsyncExitStack() as holds:
            loras = [await self._kept(lora, holds) for lora in again]
            for spec in specs:
                digest, name = await self._found(spec, owner, card, holds)
                if any(lora.id == digest for lora in loras):
                    raise BadRequest(
                        f"{name} is asked for twice; name it once, with the weights added up",
                        param=spec.param,
                    )
                loras.append(Lora(id=digest, weight=check_weight(spec.weight, spec.param), name=name))
            yield tuple(loras)

    async def register(self, spec: LoraSpec, owner: str, label: LoraLabel) -> LoraRecord:
        """The adapter as it is registered now. label.public: for everybody, which is the caller's to allow.

        Raises what `resolved` raises, Conflict for a name that is taken, QuotaExceeded.
        """
        if spec.kind == "id":
            raise BadRequest("send a file, a url or a hub id to register", param="url")
        source: LoraSource = "upload" if spec.kind == "file" else spec.kind
        async with AsyncExitStack() as holds:
            digest, info = await self._taken_in(spec, holds)
            adapter = await self._registry.add(make_record(digest, info, label, owner, source), label.preview)
        logger.info("adapter registered", extra={"adapter": adapter.id, "size_bytes": adapter.size_bytes})
        return adapter

    async def list(self, owner: str) -> list[LoraRecord]:
        """The owner's own, the public ones, and those that come with the models."""
        return [*await self._registry.list(owner), *await self._builtins.list()]

    async def get(self, id_or_name: str, owner: str) -> LoraRecord:
        """One of those that `list` gives. Raises NotFound."""
        return await self._known(id_or_name, owner, None)

    async def preview(self, id_or_name: str, owner: str) -> bytes:
        """A small WebP picture of it. Raises NotFound."""
        return await self._registry.preview(await self.get(id_or_name, owner))

    async def delete(self, id_or_name: str, owner: str, *, admin: bool) -> LoraRecord:
        """Forget it; its file goes as soon as no job needs it. Raises NotFound, Forbidden."""
        adapter = await self.get(id_or_name, owner)
        if adapter.source == "built-in":
            raise Forbidden("this adapter comes with its model and stays; take it out of the model's card")
        if adapter.owner == PUBLIC and not admin:
            raise Forbidden("this adapter is everybody's; only an admin may delete it")
        await self._registry.remove(adapter)
        logger.info("adapter deleted", extra={"adapter": adapter.id})
        await self.collect(adapter.digest)
        return adapter

    async def collect(self, digest: str) -> bool:
        """Remove the file and have replicas forget it, unless somebody still owns or needs it."""
        async with self._registry.begin_removal(digest) as free:
            if not free or digest in await self._registry.digests() or digest in await self._in_use():
                return False
            await self._results.remove(adapter_path(digest))
        await self._unload(digest)
        return True

    async def collect_all(self) -> int:
        """Remove every file that nobody owns or needs any more; how many there were."""
        wanted = await self._registry.digests() | await self._in_use()
        idle = [digest for digest in await self._results.adapters() if digest not in wanted]
        return sum([await self.collect(digest) for digest in idle])

    async def _found(
        self, spec: LoraSpec, owner: str, card: ModelCard, holds: AsyncExitStack
    ) -> tuple[str, str]:
        """Digest and name of one wished adapter, its file here and held."""
        if spec.kind != "id":
            digest, info = await self._taken_in(spec, holds)
            if info.family not in ("unknown", card.family):
                raise _misfit(info.name or "this LoRA", info.family, card, spec.param)
            await self._compatibility.check(info.name or "this LoRA", digest, card, spec.param)
            return digest, (info.name or f"lora-{digest[:8]}")[:200]
        adapter = await self._known(spec.reference, owner, card, spec.param)
        if not adapter.fits(card):
            raise _misfit(adapter.name, adapter.model or adapter.family, card, spec.param)
        if adapter.source != "built-in":
            await holds.enter_async_context(self._registry.hold(adapter.digest))
            if not await self._results.has(adapter_path(adapter.digest)):
                raise NotFound(f"the file of {adapter.name} is gone; register it again", param=spec.param)
            await self._compatibility.check(adapter.name, adapter.digest, card, spec.param)
        return adapter.digest, adapter.name

    async def _kept(self, lora: Lora, holds: AsyncExitStack) -> Lora:
        """The adapter of an earlier job, held if its file is still here."""
        if await self._builtins.find(lora.id) is None:
            await holds.enter_async_context(self._registry.hold(lora.id))
            if not await self._results.has(adapter_path(lora.id)):
                raise NotFound(f"the file of the LoRA {lora.name} is gone; send it anew", param="loras")
        return lora

    async def _known(
        self, id_or_name: str, owner: str, card: ModelCard | None, param: str = "id"
    ) -> LoraRecord:
        """A registered adapter: the owner's before public ones, and those before the models' own."""
        own = await self._registry.find(id_or_name, owner)
        model = None if card is None else card.id
        adapter = own or await self._builtins.find(id_or_name, model) or await self._builtins.find(id_or_name)
        if adapter is None:
            raise NotFound(
                f"there is no adapter {id_or_name[:200]!r}; GET /api/loras lists yours and the public ones",
                param=param,
            )
        return adapter

    async def _taken_in(self, spec: LoraSpec, holds: AsyncExitStack) -> tuple[str, LoraFileInfo]:
        """Digest and info of a file that came along, or from where it lies; stored here and held."""
        if not await self._results.free_space_ok():
            raise Overloaded(
                "there is too little room for another adapter; try again later", retry_after_s=60
            )
        async with self._intakes:
            file = await self._file(spec)
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

    async def _file(self, spec: LoraSpec) -> bytes:
        settings = self._settings
        match spec.kind:
            case "file":
                assert spec.file is not None, "a wish of this kind has a file"
                return spec.file
            case "url":
                fetched = await self._fetcher.get(
                    spec.reference, max_bytes=settings.max_adapter_bytes, timeout_s=settings.fetch_timeout_s
                )
            case _:
                if not self._hub.enabled:
                    raise Forbidden(
                        "this service fetches nothing from the hub; its operator may set WEFT_HUB_LORAS",
                        param=spec.param,
                    )
                token = settings.hf_token
                fetched = await fetch_from_hub(
                    self._hub,
                    spec.reference,
                    None if token is None else token.get_secret_value(),
                    max_bytes=settings.max_adapter_bytes,
                    timeout_s=settings.fetch_timeout_s,
                )
        logger.info("adapter fetched", extra={"size_bytes": len(fetched.data), "digest": fetched.sha256})
        return fetched.data


def _check_count(specs: Sequence[LoraSpec], card: ModelCard, others: int) -> None:
    """Before any file is fetched."""
    able = card.max_loras if card.serving.lora != "none" else 0
    if not able:
        raise BadRequest(f"{card.id} takes no LoRA; leave it out", param=specs[0].param)
    count = others + len(specs)
    if count > able:
        raise BadRequest(
            f"there are {count} LoRAs; {card.id} takes at most {able} at once",
            param=specs[max(0, able - others)].param,
        )


def _misfit(name: str, made_for: str, card: ModelCard, param: str) -> BadRequest:
    return BadRequest(
        f"{name} is made for {made_for} and does not fit {card.id}, which is of the family {card.family}",
        param=param,
    )
