"""Models loaded in one replica: the least recently used idle one is unloaded to make space for another."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from deployments.models.device_memory import PIPELINE, Needed
from deployments.models.memory_admission import MemoryAdmission, Outcome

logger = logging.getLogger(__name__)

T = TypeVar("T")

# long beside most requests, so that models of a group do not take turns for each of theirs, and short for a
# caller who waits
MAX_OVERTAKEN_S = 30.0


@dataclass(slots=True)
class _CachedModel(Generic[T]):
    model: T
    users: int = 0  # a model in use is pinned


@dataclass(slots=True)
class _Loading(Generic[T]):
    """Models that are being loaded for the requests that await it."""

    users: int = 0  # these requests
    task: asyncio.Task[list[_CachedModel[T]]] = field(init=False)

    @property
    def is_done(self) -> bool:
        """Whether the models are loaded, and pinned for these requests."""
        return self.task.done() and not self.task.cancelled() and self.task.exception() is None


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
        needed: Callable[[str], Needed] = lambda _name: Needed(0),
        prepare: Callable[[str], None] = lambda _name: None,
        free: Callable[[str], None] = lambda _name: None,
        max_overtaken_s: float = MAX_OVERTAKEN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """size_of: bytes of a loaded model. needed: of one that is not loaded yet; runs in a thread.

        admission: asked before a model is loaded; `load` records what it really took. What is claimed for a
        model is released where `load` fails, and when it has been unloaded.
        free: runs in a thread when nothing refers to an unloaded model any more.
        max_overtaken_s: how long requests for loaded models may pass a model that waits for their space;
        then they wait until it has it.
        prepare: runs in a thread before others make way for a model; what it raises leaves them loaded.
        """
        self._load = load
        self._unload = unload
        self._size_of = size_of
        self._limit = limit
        self._admission = admission
        self._needed = needed
        self._free = free
        admission.add_evictor(self._make_way, "models")
        self._entries: OrderedDict[str, _CachedModel[T]] = OrderedDict()
        self._prepare = prepare
        self._preparing: dict[str, asyncio.Lock] = {}
        self._max_overtaken_s = max_overtaken_s
        self._clock = clock
        self._joined: dict[tuple[str, ...], _Loading[T]] = {}  # by the models that requests need together
        self._loading = asyncio.Lock()
        self._waiting: _Loading[T] | None = None  # for space on the device
        self._waiting_since = 0.0
        self._let_pass = asyncio.Event()
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
        """As `using_all`, for one model."""
        async with self.using_all((name,)) as (model,):
            yield model

    @asynccontextmanager
    async def using_all(self, names: tuple[str, ...]) -> AsyncGenerator[list[T]]:
        """These models, loaded if necessary and pinned while the block runs; at most `limit`.

        Raises what `prepare` and `load` raise, OutOfMemory for models that the device cannot hold.
        """
        entries = await self._pin(names)
        try:
            yield [entry.model for entry in entries]
        finally:
            self._unpin(entries)

    async def _pin(self, names: tuple[str, ...]) -> list[_CachedModel[T]]:
        while all(name in self._entries for name in names):
            if self._may_overtake():
                entries = [self._entries[name] for name in names]
                for name, entry in zip(names, entries, strict=True):
                    entry.users += 1
                    self._entries.move_to_end(name)
                return entries
            await self._let_pass.wait()
        return await self._join_loading(names)

    def _unpin(self, entries: Sequence[_CachedModel[T]]) -> None:
        for entry in entries:
            entry.users -= 1
        self._released.set()
        self._admission.notify()

    def _may_overtake(self) -> bool:
        """Whether a request may begin to use loaded models although another model waits for space."""
        if self._waiting is None or not self._waiting.users:
            return True
        return self._clock() - self._waiting_since < self._max_overtaken_s

    def _let_others_pass(self) -> None:
        """Have requests for loaded models, which wait for another one to have its space, try again."""
        self._let_pass.set()
        self._let_pass = asyncio.Event()

    async def _join_loading(self, names: tuple[str, ...]) -> list[_CachedModel[T]]:
        """The models, pinned, by the one task that loads them for all requests; it goes on when those that
        await it are cancelled, so that nothing is lost."""
        loading = self._joined.get(names)
        if loading is None:
            loading = self._joined[names] = _Loading()
            loading.task = asyncio.create_task(self._load_and_pin(names, loading))
            loading.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # is retrieved
        loading.users += 1
        try:
            return await asyncio.shield(loading.task)
        except BaseException:
            if loading.is_done:
                self._unpin(loading.task.result())
            else:
                loading.users -= 1
                self._let_others_pass()
            raise

    async def _load_and_pin(self, names: tuple[str, ...], loading: _Loading[T]) -> list[_CachedModel[T]]:
        pinned: dict[str, _CachedModel[T]] = {}
        try:
            for name in names:
                async with self._preparing.setdefault(name, asyncio.Lock()):  # others load during a download
                    if name not in self._entries:
                        await asyncio.to_thread(self._prepare, name)
            async with self._loading:  # one at a time: two could each hold what the other one needs
                for name in names:
                    entry = self._entries.get(name) or await self._load_entry(name, loading, [*pinned])
                    entry.users += 1
                    pinned[name] = entry
        except BaseException:
            self._unpin([*pinned.values()])
            raise
        finally:
            del self._joined[names]
        for name, entry in pinned.items():
            entry.users += loading.users - 1
            self._entries.move_to_end(name)
        self._released.set()
        return [*pinned.values()]

    async def _load_entry(self, name: str, loading: _Loading[T], beside: Sequence[str]) -> _CachedModel[T]:
        """The model, which was not loaded. beside: models that the same requests hold."""
        if (leaving := self._leaving.get(name)) is not None:  # it would release what is claimed now
            await asyncio.wait([leaving])
        self._waiting, self._waiting_since = loading, self._clock()
        try:
            await self._make_space(name, beside)
        finally:
            self._waiting = None
            self._let_others_pass()
        try:
            model = await asyncio.to_thread(self._load, name)
        except BaseException:
            self._release(name)
            raise
        entry = self._entries[name] = _CachedModel(model)
        logger.info("model added to the cache", extra={"model": name, "bytes": self._size_of(model)})
        return entry

    async def _make_space(self, name: str, beside: Sequence[str]) -> None:
        """Unload idle models until one more fits; waits while none is idle."""
        while len(self._entries) >= self._limit:
            if await self._make_way(name) != "freed":
                self._released.clear()
                await self._released.wait()
        needed, thing = await asyncio.to_thread(self._needed, name), (name, PIPELINE)
        held = [(other, PIPELINE) for other in beside]
        await self._admission.admit(
            "weights", thing, needed, f"the model {name}", beside=held, unlimited_wait=True
        )

    async def _make_way(self, name: str) -> Outcome:
        """Unload the least recently used idle model, for the model of this name."""
        others = {other: entry for other, entry in self._entries.items() if other != name}
        idle = next((other for other, entry in others.items() if not entry.users), None)
        if idle is not None:
            # a task of its own: it ends also when the request that needs the memory is cancelled
            unloading = asyncio.create_task(self._unload_entry(idle, self._entries.pop(idle)))
            self._leaving[idle] = unloading
        elif self._leaving:
            unloading = next(iter(self._leaving.values()))
        else:
            return "in_use" if others else "nothing"
        await asyncio.shield(unloading)
        return "freed"

    async def _unload_entry(self, name: str, entry: _CachedModel[T]) -> None:
        size_bytes = self._size_of(entry.model)
        try:
            await self.before_unload(entry.model)
            await self._admission.in_unload_thread(partial(self._unload, entry.model))
            del entry.model  # before its memory is released for others
            await self._admission.in_unload_thread(partial(self._free, name))
        finally:
            del self._leaving[name]
            self._release(name)
        logger.info("model unloaded", extra={"model": name, "bytes": size_bytes})

    def _release(self, name: str) -> None:
        self._admission.memory.release_model(name)
        self._admission.notify()


async def _nothing_to_do(_model: object) -> None:
    """Of a cache whose models nothing else refers to."""
