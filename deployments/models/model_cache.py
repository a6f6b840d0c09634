"""Models loaded in one replica: the least recently used idle one is unloaded to make space for another."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from deployments.models.memory_admission import MemoryAdmission, Outcome

logger = logging.getLogger(__name__)

T = TypeVar("T")
PIPELINE = "pipeline"  # the thing under which the account of the memory holds a model's own weights


@dataclass(slots=True)
class _CachedModel(Generic[T]):
    model: T
    users: int = 0  # a model in use is pinned


class ModelCache(Generic[T]):
    """At most `limit` models, and no more than the device's memory admits. Used from one event loop.

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
        admission: MemoryAdmission,
        expected_bytes: Callable[[str], int] = lambda _name: 0,
        prepare: Callable[[str], None] = lambda _name: None,
    ) -> None:
        """size_of: bytes of a loaded model; expected_bytes: of one that is not loaded yet, by name.

        admission: asked before a model is loaded. `load` records what it really took, nothing if it fails,
        and `unload` releases it.
        prepare: runs in a thread before others make way for a model; what it raises leaves them loaded.
        """
        self._load = load
        self._unload = unload
        self._size_of = size_of
        self._limit = limit
        self._admission = admission
        self._expected_bytes = expected_bytes
        admission.add_evictor(self._make_way)
        self._entries: OrderedDict[str, _CachedModel[T]] = OrderedDict()
        self._prepare = prepare
        self._preparing: dict[str, asyncio.Lock] = {}
        self._loading = asyncio.Lock()
        self._released = asyncio.Event()
        self._leaving: dict[str, asyncio.Task[None]] = {}  # models that are being unloaded
        # awaited with a model that is going to be unloaded, which no request uses any more
        self.before_unload: Callable[[T], Awaitable[None]] = _nothing_to_do

    @property
    def loaded(self) -> dict[str, int]:
        """Bytes by name, the least recently used first."""
        return {name: self._size_of(entry.model) for name, entry in self._entries.items()}

    @property
    def models(self) -> list[T]:
        """All loaded models."""
        return [entry.model for entry in list(self._entries.values())]

    def put(self, name: str, model: T) -> None:
        """Add a model that was loaded elsewhere, such as at the start."""
        self._entries[name] = _CachedModel(model)

    @asynccontextmanager
    async def using(self, name: str) -> AsyncGenerator[T]:
        """The model, loaded if necessary and pinned while the block runs.

        Raises what `prepare` and `load` raise, OutOfMemory for a model that the device cannot hold.
        """
        while (entry := self._entries.get(name)) is None:
            loading = asyncio.ensure_future(self._load_entry(name))
            loading.add_done_callback(
                lambda task: task.cancelled() or task.exception()
            )  # retrieved here, too
            await asyncio.shield(loading)  # goes on when its request is cancelled, so that nothing is lost
        entry.users += 1
        self._entries.move_to_end(name)
        try:
            yield entry.model
        finally:
            entry.users -= 1
            self._released.set()
            self._admission.notify()

    async def _load_entry(self, name: str) -> None:
        async with self._preparing.setdefault(name, asyncio.Lock()):  # others load while this one downloads
            if name in self._entries:
                return
            await asyncio.to_thread(self._prepare, name)
        async with self._loading:
            if name in self._entries:
                return
            if (leaving := self._leaving.get(name)) is not None:  # it would release what is claimed now
                await asyncio.shield(leaving)
            await self._make_space(name)
            model = await asyncio.to_thread(self._load, name)
            self._entries[name] = _CachedModel(model)
            logger.info("model added to the cache", extra={"model": name, "bytes": self._size_of(model)})

    async def _make_space(self, name: str) -> None:
        """Unload idle models until one more fits; waits while none is idle."""
        while len(self._entries) >= self._limit:
            if await self._make_way(name) != "freed":
                self._released.clear()
                await self._released.wait()
        size_bytes, thing = self._expected_bytes(name), (name, PIPELINE)
        await self._admission.admit("weights", thing, size_bytes, f"the model {name}", unlimited_wait=True)

    async def _make_way(self, name: str) -> Outcome:
        """Unload the least recently used idle model, for the model of this name."""
        others = {other: entry for other, entry in self._entries.items() if other != name}
        idle = next((other for other, entry in others.items() if not entry.users), None)
        if idle is not None:
            # a task of its own: it ends also when the request that needs the memory is cancelled
            unloading = asyncio.create_task(self._unload_entry(idle, self._entries.pop(idle).model))
            self._leaving[idle] = unloading
        elif self._leaving:
            unloading = next(iter(self._leaving.values()))
        else:
            return "in_use" if others else "nothing"
        await asyncio.shield(unloading)
        return "freed"

    async def _unload_entry(self, name: str, model: T) -> None:
        size_bytes = self._size_of(model)
        try:
            await self.before_unload(model)
            await asyncio.to_thread(self._unload, model)
        finally:
            del self._leaving[name]
        logger.info("model unloaded", extra={"model": name, "bytes": size_bytes})
        self._admission.notify()


async def _nothing_to_do(_model: object) -> None:
    """Of a cache whose models nothing else refers to."""
