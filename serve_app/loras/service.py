"""The API's one way to LoRAs: register, list, get, delete, and resolve those that a request asks for."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest, Forbidden, NotFound
from deployments.protocol.request import Lora
from deployments.validation.inputs import check_lora_count
from serve_app.loras.builtin import BuiltInLoras
from serve_app.loras.compatibility import CompatibilityCheck
from serve_app.loras.intake import LoraIntake
from serve_app.loras.record import (
    PUBLIC,
    LoraLabel,
    LoraRecord,
    LoraSource,
    default_name,
    fits_family,
    make_record,
)
from serve_app.loras.registry import LoraRegistry
from serve_app.loras.spec import LoraSpec, check_weight
from serve_app.storage.results import ResultStore, adapter_path

logger = logging.getLogger(__name__)

InUse = Callable[[], Awaitable[set[str]]]  # digests that jobs in progress need
Unload = Callable[[str], Awaitable[None]]  # removes this digest from every replica


class LoraService:
    """What owners of LoRAs may do. The LoRA of another owner looks like one that does not exist."""

    def __init__(
        self,
        registry: LoraRegistry,
        results: ResultStore,
        builtins: BuiltInLoras,
        intake: LoraIntake,
        compatibility: CompatibilityCheck,
        *,
        in_use: InUse,
        unload: Unload,
    ) -> None:
        self._registry = registry
        self._results = results
        self._builtins = builtins
        self._intake = intake
        self._compatibility = compatibility
        self._in_use = in_use
        self._unload = unload

    @asynccontextmanager
    async def resolve(
        self, specs: Sequence[LoraSpec], owner: str, card: ModelCard, again: Sequence[Lora] = ()
    ) -> AsyncIterator[tuple[Lora, ...]]:
        """The LoRAs by digest, checked and stored; no process removes their files while this is open.

        again: LoRAs of an earlier job of the same owner, used once more.
        Raises NotFound, BadRequest (wrong family or shape, named twice, bad file), Forbidden, TooLarge,
        Overloaded.
        """
        _check_count(specs, card, len(again))
        async with AsyncExitStack() as holds:
            loras = [await self._hold_again(lora, holds) for lora in again]
            for spec in specs:
                digest, name = await self._find(spec, owner, card, holds)
                if any(lora.id == digest for lora in loras):
                    raise BadRequest(
                        f"{name} is named twice; name it once, with the weights added up", param=spec.param
                    )
                loras.append(Lora(id=digest, weight=check_weight(spec.weight, spec.param), name=name))
            yield tuple(loras)

    async def register(self, spec: LoraSpec, owner: str, label: LoraLabel) -> LoraRecord:
        """The LoRA as it is registered now. label.public: for every caller; the caller of this method
        authorises it.

        Raises what `resolve` raises, Conflict for a name that is taken, QuotaExceeded.
        """
        if spec.kind == "id":
            raise BadRequest("send a file, a url or a hub id to register", param="url")
        source: LoraSource = "upload" if spec.kind == "file" else spec.kind
        async with AsyncExitStack() as holds:
            digest, info = await self._intake.take_in(spec, owner, holds)
            record = make_record(digest, info, label, owner, source)
            record = await self._registry.add(record, label.preview)
        logger.info("LoRA registered", extra={"lora": record.id, "size_bytes": record.size_bytes})
        return record

    async def list(self, owner: str) -> list[LoraRecord]:
        """The owner's own, the public ones, and those that come with the models."""
        return [*await self._registry.list(owner), *await self._builtins.list()]

    async def get(self, id_or_name: str, owner: str) -> LoraRecord:
        """One of those that `list` returns. Raises NotFound."""
        return await self._find_record(id_or_name, owner, None)

    async def preview(self, id_or_name: str, owner: str) -> bytes:
        """A small WebP picture. Raises NotFound."""
        return await self._registry.preview(await self.get(id_or_name, owner))

    async def delete(self, id_or_name: str, owner: str, *, admin: bool) -> LoraRecord:
        """Delete the record; the file is removed when no job needs it. Raises NotFound, Forbidden."""
        record = await self.get(id_or_name, owner)
        if record.source == "built-in":
            raise Forbidden(
                "this adapter comes with its model and cannot be deleted; take it out of the model's card"
            )
        if record.owner == PUBLIC and not admin:
            raise Forbidden("this adapter is public; only an admin may delete it")
        await self._registry.remove(record)
        logger.info("LoRA deleted", extra={"lora": record.id})
        await self.collect(record.digest)
        return record

    async def collect(self, digest: str) -> bool:
        """Remove the file here and on every replica, unless a record or a job needs it; whether it was
        removed."""
        async with self._registry.begin_removal(digest) as free:
            if not free or digest in await self._registry.digests() or digest in await self._in_use():
                return False
            await self._results.remove(adapter_path(digest))
        await self._unload(digest)
        return True

    async def collect_all(self) -> int:
        """Remove every file that no record and no job needs; how many were removed."""
        needed = await self._registry.digests() | await self._in_use()
        idle = [digest for digest in await self._results.adapters() if digest not in needed]
        return sum([await self.collect(digest) for digest in idle])

    async def _find(
        self, spec: LoraSpec, owner: str, card: ModelCard, holds: AsyncExitStack
    ) -> tuple[str, str]:
        """Digest and name of a LoRA that fits the model, its file stored and held."""
        if spec.kind != "id":
            digest, info = await self._intake.take_in(spec, owner, holds)
            shown = info.name or "this LoRA"
            fits = await self._compatibility.check(shown, digest, card, spec.param)
            if not fits and not fits_family(info.family, card):
                raise _wrong_model(shown, info.family, card, spec.param)
            return digest, (info.name or default_name(digest))[:200]
        record = await self._find_record(spec.reference, owner, card, spec.param)
        fits = record.fits(card)
        if record.source != "built-in":
            await self._hold_file(record.digest, record.name, "register it again", spec.param, holds)
            # layers decide where they are known: the family is a guess by a few names
            fits |= await self._compatibility.check(record.name, record.digest, card, spec.param)
        if not fits:
            raise _wrong_model(record.name, record.model or record.family, card, spec.param)
        return record.digest, record.name

    async def _hold_again(self, lora: Lora, holds: AsyncExitStack) -> Lora:
        """The LoRA of an earlier job, held if its file is still stored."""
        if await self._builtins.find(lora.id) is None:
            await self._hold_file(lora.id, f"the LoRA {lora.name}", "send it anew", "loras", holds)
        return lora

    async def _hold_file(
        self, digest: str, name: str, remedy: str, param: str, holds: AsyncExitStack
    ) -> None:
        await holds.enter_async_context(self._registry.hold(digest))
        if not await self._results.has(adapter_path(digest)):
            raise NotFound(f"the file of {name} is gone; {remedy}", param=param)

    async def _find_record(
        self, id_or_name: str, owner: str, card: ModelCard | None, param: str = "id"
    ) -> LoraRecord:
        """The owner's own before public ones, and those before the models' own. Raises NotFound."""
        registered = await self._registry.find(id_or_name, owner)
        model = None if card is None else card.id
        record = (
            registered
            or await self._builtins.find(id_or_name, model)
            or await self._builtins.find(id_or_name)
        )
        if record is None:
            raise NotFound(
                f"there is no adapter {id_or_name[:200]!r}; GET /api/loras lists yours and the public ones",
                param=param,
            )
        return record


def _check_count(specs: Sequence[LoraSpec], card: ModelCard, others: int) -> None:
    """Raises BadRequest for the first spec past what the model takes, before any file is fetched."""
    if specs:
        first_excess = specs[min(len(specs) - 1, max(0, card.lora_limit - others))]
        check_lora_count(others + len(specs), card, first_excess.param)


def _wrong_model(name: str, made_for: str, card: ModelCard, param: str) -> BadRequest:
    return BadRequest(
        f"{name} is made for {made_for} and does not fit {card.id}, which is of the family {card.family}",
        param=param,
    )
