"""Models loaded in one replica: the least recently used idle one is unloaded to make space for another."""

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
    users: int = 0  # a model in use is pinned


class ModelCache(Generic[T]):
    """At most `limit` models of at most `max_bytes` in total. Used from one event loop.

    Loading and unloading run in a thread, one at a time, so that requests for loaded models continue.
    An OrderedDict and no cachetools.LRUCache, because eviction skips pinned models and may have to wait.
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
        """size_of: bytes of a loaded model; expected_bytes: of one that is not loaded yet, by name.

        max_bytes: None for no limit.
        """
        self._load = load
        self._unload = unload
        self._size_of = size_of
        self._limit = limit
        self._max_bytes = max_bytes
        self._expected_bytes = expected_bytes
        self._entries: OrderedDict[str, _CachedModel[T]] = OrderedDict()
        self._loading = asyncio.Lock()
        self._released = asyncio.Event()

    @property
    def loaded(self) -> dict[str, int]:
        """Bytes by name, the least recently used first."""
        return {name: entry.size_bytes for name, entry in self._entries.items()}

    @property
    def models(self) -> list[T]:
        """All loaded models."""
        return [entry.model for entry in list(self._entries.values())]

    def put(self, name: str, model: T) -> None:
        """Add a model that was loaded elsewhere, such as at the start."""
        self._entries[name] = _CachedModel(model, self._size_of(model))

    @asynccontextmanager
    async def using(self, name: str) -> AsyncGenerator[T]:
        """The model, loaded if necessary and pinned while the block runs. Raises what `load` raises."""
        entry = self._entries.get(name)
        if entry is None:
            entry = await self._load_pinned(name)
        else:
            entry.users += 1
        self._entries.move_to_end(name)
        try:
            yield entry.model
        finally:
            entry.users -= 1
            self._released.set()

    async def _load_pinned(self, name: str) -> _CachedModel[T]:
        async with self._loading:
            entry = self._entries.get(name)
            if entry is None:
                await self._make_space(self._expected_bytes(name))
                model = await asyncio.to_thread(self._load, name)
                entry = self._entries[name] = _CachedModel(model, self._size_of(model))
                logger.info("model added to the cache", extra={"model": name, "bytes": entry.size_bytes})
            entry.users += 1
            return entry

    async def _make_space(self, needed_bytes: int) -> None:
        """Unload idle models until one more fits; waits while none is idle."""
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
