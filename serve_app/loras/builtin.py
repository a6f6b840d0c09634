"""LoRAs that come with the models: named on the cards, read from their paths."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

from deployments.lora_format.file_info import inspect_lora
from deployments.protocol.card import CardLora, ModelCard
from deployments.protocol.errors import BadRequest, Internal
from serve_app.loras.record import PUBLIC, LoraRecord
from serve_app.settings import ROOT


class BuiltInLoras:
    """The LoRAs of these cards, a collection that may change. Each file is read once, on first use."""

    def __init__(self, cards: Collection[ModelCard]) -> None:
        self._cards = cards
        self._records: dict[tuple[str, str, str], LoraRecord] = {}  # by card, id and path
        self._paths: dict[str, Path] = {}  # by digest
        self._reading = asyncio.Lock()

    async def list(self) -> list[LoraRecord]:
        """All of them, in the order of the cards. Raises Internal when a card names a file that is no
        LoRA."""
        return [record for _, record in await self._all()]

    async def find(self, name: str, model: str | None = None) -> LoraRecord | None:
        """The one with this id or digest, or path as its card writes it. model: id of its model; None: of
        any."""
        folded = name.casefold()
        for entry, record in await self._all():
            if model in (None, record.model) and (folded == record.id or name in (entry.path, record.digest)):
                return record
        return None

    async def file(self, digest: str) -> bytes | None:
        """The file with this SHA-256 (hex), if a card names it."""
        await self.list()
        path = self._paths.get(digest)
        return None if path is None else await asyncio.to_thread(path.read_bytes)

    async def _all(self) -> Sequence[tuple[CardLora, LoraRecord]]:
        found = []
        async with self._reading:
            listed = [(card, entry) for card in self._cards for entry in card.adapters]
            for card, entry in listed:
                key = card.id, entry.id, entry.path
                if key not in self._records:
                    self._records[key] = await asyncio.to_thread(self._read, card, entry)
                found.append((entry, self._records[key]))
        return found

    def _read(self, card: ModelCard, entry: CardLora) -> LoraRecord:
        path = ROOT / Path(entry.path).expanduser()
        try:
            file = path.read_bytes()
            info = inspect_lora(file)
        except (OSError, BadRequest) as error:
            raise Internal(f"the card of {card.id} names the LoRA {entry.id}: {error}") from error
        digest = hashlib.sha256(file).hexdigest()
        self._paths[digest] = path
        return LoraRecord(
            id=entry.id,
            digest=digest,
            owner=PUBLIC,
            name=entry.id,
            family=card.family,
            rank=info.rank,
            dtype=info.dtype,
            size_bytes=info.size_bytes,
            trigger_words=tuple(entry.trigger_words) or info.trigger_words,
            description=entry.description,
            licence=entry.licence or card.licence.name,
            source="built-in",
            created_at=0.0,
            model=card.id,
            notes=info.notes,
        )
