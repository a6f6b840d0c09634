"""Models loaded in one replica: the least recently used makes room, one in use never does."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(slots=True)
class _CachedModel(Generic[T]):
    model: T
    size_bytes: int
    users: int = 0


class ModelCache(Generic[T]):
    """At most `limit` models of at most `max_bytes` together. Used from one event loop.

    Loading and unloading run in a thread, one at a time, so that requests of loaded models go on.
    """

    def __init__(
        self,
        load: Callable[[str], T],
        unload: Callable[[T], None],
        size_of: Callable[[T], int],
        *,
        limit: int,
        max_bytes: int | None = None,
        expected_bytes: Callable[[str], int] = lambda _name: 0,
    ) -> None:
        """expected_bytes: of a model that is not loaded yet; size_of: of one that is.

        max_bytes: None for no bound but the number.
        """
        self._load = load
        self._unload = unload
        self._size_of = size_of
        self._limit = limit
        self._max_bytes = max_bytes
        self._expected_bytes = expected_bytes
        self._entries: OrderedDict[str, _CachedModel[T]] = OrderedDict()
        self._loading = asyncio.Lock()  # of the one that loads
        self._released = asyncio.Event()

    @property
    def loaded(self) -> dict[str, int]:
        """Bytes by name, the least recently used first."""
        return {name: entry.size_bytes for name, entry in self._entries.items()}

    @property
    def models(self) -> list[T]:
        """All that are loaded."""
        return [entry.model for entry in list(self._entries.values())]

    def put(self, name: str, model: T) -> None:
        """A model that was loaded before anybody asked."""
        self._entries[name] = _CachedModel(model, self._size_of(model))

    @asynccontextmanager
    async def using(self, name: str) -> AsyncGenerator[T]:
        """The model, loaded if need be; it stays as long as the block runs. Errors of `load` pass through."""
        entry = self._entries.get(name)
        if entry is None:
            entry = await self._fetch(name)
        else:
            entry.users += 1
        self._entries.move_to_end(name)
        try:
            yield entry.model
        finally:
            entry.users -= 1
            self._released.set()

    async def _fetch(self, name: str) -> _CachedModel[T]:
        async with self._loading:
            entry = self._entries.get(name)
            if entry is None:
                await self._make_room(self._expected_bytes(name))
                model = await asyncio.to_thread(self._load, name)
                entry = self._entries[name] = _CachedModel(model, self._size_of(model))
                logger.info("model loaded", extra={"model": name, "bytes": entry.size_bytes})
            entry.users += 1
            return entry

    async def _make_room(self, needed_bytes: int) -> None:
        """Unload idle models until one more fits, waiting for one to fall idle."""
        while self._entries and not self._fits(needed_bytes):
            idle = next((name for name, entry in self._entries.items() if not entry.users), None)
            if idle is None:
                self._released.clear()
                await self._released.wait()
                continue
            entry = self._entries.pop(idle)
            await asyncio.to_thread(self._unload, entry.model)
            logger.info("model unloaded", extra={"model": idle, "bytes": entry.size_bytes})

    def _fits(self, needed_bytes: int) -> bool:
        if len(self._entries) >= self._limit:
            return False
        used = sum(entry.size_bytes for entry in self._entries.values())
        return self._max_bytes is None or used + needed_bytes <= self._max_bytes
