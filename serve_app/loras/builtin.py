"""LoRAs that come with the models: named on the cards, read from their paths."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from deployments.lora_format.file_info import LoraFileInfo, inspect_file
from deployments.lora_format.header import refusal
from deployments.lora_format.layer_names import LayerNames
from deployments.lora_format.placement import place
from deployments.protocol.card import CardLora, ModelCard
from deployments.protocol.errors import BadRequest, Internal
from serve_app.loras.model_layers import stored_layer_shapes
from serve_app.loras.record import PUBLIC, LoraRecord
from serve_app.settings import ROOT

RETRY_S = 30.0  # after a file that could not be used; its operator may have replaced it

logger = logging.getLogger(__name__)

_Key = tuple[str, str, str]  # card, id and path


class BuiltInLoras:
    """The LoRAs of these cards, a collection that may change. Each file is read once, on first use.

    One that cannot be used is logged and left out of the list; who asks for it gets the reason.
    """

    def __init__(self, cards: Collection[ModelCard]) -> None:
        self._cards = cards
        self._records: dict[_Key, LoraRecord] = {}
        self._failures: dict[_Key, tuple[float, Internal]] = {}  # with the time.monotonic() of the next try
        self._paths: dict[str, Path] = {}  # by digest
        self._reading = asyncio.Lock()

    async def list(self) -> list[LoraRecord]:
        """All that can be used, in the order of the cards."""
        return [record for _, record in await self._all()]

    async def find(self, name: str, model: str | None = None) -> LoraRecord | None:
        """The one with this id or digest, or path as its card writes it. model: id of its model; None: of
        any.

        Raises Internal with the reason for one that cannot be used.
        """
        folded = name.casefold()
        for entry, record in await self._all():
            if model in (None, record.model) and (folded == record.id or name in (entry.path, record.digest)):
                return record
        for (card_id, lora_id, path), (_, error) in self._failures.items():
            if model in (None, card_id) and (folded == lora_id or name == path):
                raise error
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
                    await self._try_to_read(key, card, entry)
                if key in self._records:
                    found.append((entry, self._records[key]))
        return found

    async def _try_to_read(self, key: _Key, card: ModelCard, entry: CardLora) -> None:
        next_try, _ = self._failures.get(key, (0.0, None))
        if time.monotonic() < next_try:
            return
        try:
            self._records[key] = await asyncio.to_thread(self._read, card, entry)
            self._failures.pop(key, None)
        except Internal as error:
            self._failures[key] = time.monotonic() + RETRY_S, error
            about = {"model": card.id, "lora": entry.id, "error": error.message}
            logger.error("a LoRA of a model's card cannot be used", extra=about)

    def _read(self, card: ModelCard, entry: CardLora) -> LoraRecord:
        path = ROOT / Path(entry.path).expanduser()
        try:
            file = path.read_bytes()
            info = _checked(file, card)
        except (OSError, BadRequest) as error:
            raise Internal(f"the card of {card.id} names the LoRA {entry.id}: {error}") from error
        digest = hashlib.sha256(file).hexdigest()
        self._paths[digest] = path
        return LoraRecord(
            id=entry.id,
            digest=digest,
            owner=PUBLIC,
            name=entry.id,
            family=card.family or "unknown",
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


def _checked(file: bytes, card: ModelCard) -> LoraFileInfo:
    """What the file is. Raises BadRequest for one that is no LoRA, or none for the layers of the model, where
    these are known without a replica."""
    header, info, values = inspect_file(file)
    layers = stored_layer_shapes(card.weights)
    for problem in place(header, LayerNames(layers)).problems if layers else ():
        if not values.is_harmless(problem):
            raise refusal(problem.reason)
    return info
