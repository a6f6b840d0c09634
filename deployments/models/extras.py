"""What is loaded beside the pipelines of a replica when a request first needs it: ControlNets, refiners and
preprocessors. The least recently used idle one is unloaded where another thing needs its memory."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

from deployments.engine.call import Seam
from deployments.models.device_memory import Thing
from deployments.models.memory_admission import MemoryAdmission, Outcome

logger = logging.getLogger(__name__)

# how long requests for what is loaded may pass one that waits for something else to be loaded: long beside
# most requests, so that two ControlNets do not take turns for each of theirs, and short for a caller
MAX_OVERTAKEN_S = 30.0


@dataclass(slots=True, eq=False)
class Extra:
    """One of them. Changed by Extras only."""

    what: str  # such as "the ControlNet models/tiny-sd15-canny"
    things: tuple[Thing, ...]  # under which the account of the memory has its weights
    # run in a thread, with the things of the model that its request holds already. After a failure nothing is
    # left of it
    load: Callable[[Collection[Thing]], None]
    unload: Callable[[], Awaitable[None]]  # afterwards its memory is free
    users: int = 0  # requests that pin it

    @property
    def model(self) -> str:
        """Beside whose pipeline it is loaded."""
        return self.things[0][0]


class Extras:
    """Those of all models of one replica. Used from one event loop."""

    def __init__(self, admission: MemoryAdmission, max_overtaken_s: float = MAX_OVERTAKEN_S) -> None:
        """max_overtaken_s: how long requests for what is loaded may pass one that waits for memory; then they
        wait until it has it."""
        self._admission = admission
        self._max_overtaken_s = max_overtaken_s
        self._loaded: OrderedDict[Extra, None] = OrderedDict()  # the least recently used first
        self._leaving: dict[Extra, asyncio.Task[None]] = {}
        # held by the request that waits for several: two could each hold what the other one needs
        self._loading = asyncio.Lock()
        self._next: Extra | None = None  # that is being loaded, or waits for memory
        # awaited with the seams of one that is going to be unloaded, which no request uses any more
        self.before_unload: Callable[[Sequence[Seam]], Awaitable[None]] = _nothing_to_do
        self.evicted: dict[str, int] = {}  # by model, those that were unloaded for others
        admission.add_evictor(self.make_way, "extras")

    @asynccontextmanager
    async def using(self, wanted: Sequence[Extra], held: Sequence[Thing] = ()) -> AsyncGenerator[None]:
        """Have all of these loaded, and kept while the block runs. Raises what their `load` raises.

        held: what else the request has of the device until it ends.

        A request that is cancelled while it waits ends when what is being loaded is there: its model must
        not be unloaded meanwhile.
        """
        if wanted and not self._may_overtake():
            await self._wait_for_others()
        if not all(extra in self._loaded for extra in wanted):
            loading = asyncio.ensure_future(self._load_and_pin(wanted, held))
            try:
                await asyncio.shield(loading)
            except asyncio.CancelledError:
                loading.add_done_callback(partial(self._unpin_loaded, wanted))
                await asyncio.wait([loading])
                raise
        else:
            self._pin(wanted)
        try:
            yield
        finally:
            self._unpin(wanted)

    async def make_way(self, _model: str) -> Outcome:
        """Unload the least recently used idle one."""
        idle = next((extra for extra in self._loaded if not extra.users), None)
        if idle is not None:
            del self._loaded[idle]
            # a task of its own: it ends also when the request that needs the memory is cancelled
            unloading = self._leaving[idle] = asyncio.create_task(self._unload(idle))
        elif self._leaving:
            unloading = next(iter(self._leaving.values()))
        else:
            return "in_use" if self._loaded else "nothing"
        await asyncio.shield(unloading)
        return "freed"

    async def forget(self, model: str) -> None:
        """The model is going to be unloaded with all that is beside it, which no request uses any more."""
        for extra in [extra for extra in self._loaded if extra.model == model]:
            del self._loaded[extra]
        leaving = [task for extra, task in self._leaving.items() if extra.model == model]
        if leaving:
            await asyncio.wait(leaving)

    async def _load_and_pin(self, wanted: Sequence[Extra], held: Sequence[Thing]) -> None:
        async with self._loading:
            pinned: list[Extra] = []
            try:
                for extra in wanted:
                    await self._load(extra, [*held, *(thing for other in pinned for thing in other.things)])
                    self._pin([extra])
                    pinned.append(extra)
            except BaseException:
                self._unpin(pinned)
                raise

    def _may_overtake(self) -> bool:
        """Whether a request may begin to use what is loaded although another one waits for memory."""
        things = () if self._next is None else self._next.things
        return all(self._admission.waited_s(thing) <= self._max_overtaken_s for thing in things)

    async def _wait_for_others(self) -> None:
        """Until those have what they wait for, but not for ever: they may be waiting for a LoRA of this
        request."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._admission.wait_s), self._loading:
                pass

    async def _load(self, extra: Extra, held: Collection[Thing]) -> None:
        if (leaving := self._leaving.get(extra)) is not None:  # it would release what is claimed now
            await asyncio.wait([leaving])
        if extra not in self._loaded:
            self._next = extra
            try:
                await asyncio.to_thread(extra.load, held)
            finally:
                self._next = None
            self._loaded[extra] = None

    def _pin(self, extras: Sequence[Extra]) -> None:
        for extra in extras:
            extra.users += 1
            self._loaded.move_to_end(extra)

    def _unpin(self, extras: Sequence[Extra]) -> None:
        for extra in extras:
            extra.users -= 1
        if extras:
            self._admission.notify()

    def _unpin_loaded(self, extras: Sequence[Extra], loading: asyncio.Future[None]) -> None:
        if not loading.cancelled() and loading.exception() is None:
            self._unpin(extras)

    async def _unload(self, extra: Extra) -> None:
        try:
            await extra.unload()
        finally:
            del self._leaving[extra]
            self._admission.notify()
        self.evicted[extra.model] = self.evicted.get(extra.model, 0) + 1
        logger.info("unloaded, because others need its memory", extra={"what": extra.what})


async def _nothing_to_do(_seams: object) -> None:
    """Of modules that no engine computes with."""
