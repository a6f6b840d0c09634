"""Who gets memory of the device, and who gives way: idle LoRAs first, then idle ControlNets, refiners and
preprocessors, then idle models."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Literal, get_args

from deployments.models.device_memory import DeviceMemory, Needed, Part, Thing, gib
from deployments.protocol.errors import OutOfMemory, Overloaded

logger = logging.getLogger(__name__)

# for memory that running requests hold, while none of them comes nearer to its end; then the request is
# refused
WAIT_S = 60.0

# what a holder did for a model that needs memory: it freed some; it will, when a running request of another
# model or LoRA ends; it has none to give
Outcome = Literal["freed", "in_use", "nothing"]
Evictor = Callable[[str], Awaitable[Outcome]]
Kind = Literal["loras", "extras", "models"]  # of holders, in the order in which they are asked


class _NothingToFree(Exception):
    """No holder will release anything for the one that needs memory."""


class MemoryAdmission:
    """Admits weights and LoRAs to the device. One event loop, set by `enter_loop`, does all waiting."""

    def __init__(
        self, memory: DeviceMemory, wait_s: float = WAIT_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """wait_s: how long a request waits for memory that others hold while they make no progress."""
        self.memory = memory
        self.wait_s = wait_s
        # a number that grows as running requests come nearer to their ends
        self.progress: Callable[[], int] = lambda: 0
        self._clock = clock
        self._waiting_since: dict[Thing, float] = {}
        self._evictors: dict[Kind, list[Evictor]] = {kind: [] for kind in get_args(Kind)}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        # of its own: the default ones may all be waiting for the memory that is freed here
        self._unloading = ThreadPoolExecutor(1, thread_name_prefix="unload")

    def enter_loop(self) -> None:
        """Admissions of other threads run on the current event loop from now on."""
        self._loop = asyncio.get_running_loop()

    def add_evictor(self, evictor: Evictor, kind: Kind) -> Callable[[], None]:
        """Ask this holder when memory is needed, until the returned function is called."""
        self._evictors[kind].append(evictor)
        return lambda: self._evictors[kind].remove(evictor)

    async def in_unload_thread(self, work: Callable[[], None]) -> None:
        """Run what an evictor does to free memory, where it may block."""
        await asyncio.get_running_loop().run_in_executor(self._unloading, work)

    def notify(self) -> None:
        """Have those that wait try again: a request has ended, or has begun to wait."""
        self._changed.set()
        self._changed = asyncio.Event()

    def notify_from_thread(self) -> None:
        """As `notify`, for a thread other than the event loop's."""
        with suppress(RuntimeError):  # the loop is closed
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self.notify)

    async def admit(
        self,
        part: Part,
        thing: Thing,
        needed: Needed,
        what: str,
        *,
        beside: Collection[Thing] = (),
        unlimited_wait: bool = False,
    ) -> None:
        """Claim what a thing needs; what is idle is evicted for it.

        what: names it in messages, such as "the LoRA 1f3c". beside: what the same request holds and does not
        release before. unlimited_wait: wait also while no running request comes nearer to its end.
        Raises OutOfMemory where it can never fit beside its model, Overloaded where running requests will
        not free enough, or made no progress for `wait_s`.
        """
        self._check_possible(thing, needed, what, beside)
        self._waiting_since[thing] = self._clock()
        try:
            while True:
                before = self.progress()
                try:
                    async with asyncio.timeout(None if unlimited_wait else self.wait_s):
                        await self._wait_and_claim(part, thing, needed)
                    return
                except TimeoutError:
                    if self.progress() == before:
                        raise
        except (TimeoutError, _NothingToFree):
            raise Overloaded(
                f"{what} needs {_shown(needed)} of the device's memory, which running requests hold; "
                "try again later",
                retry_after_s=self.wait_s,
            ) from None
        finally:
            self._waiting_since.pop(thing, None)

    def waited_s(self, thing: Thing) -> float:
        """How long this thing has been waiting for memory; 0: it is not."""
        since = self._waiting_since.get(thing)
        return 0.0 if since is None else self._clock() - since

    def admit_from_thread(
        self, part: Part, thing: Thing, needed: Needed, what: str, beside: Collection[Thing] = ()
    ) -> None:
        """As `admit`, for a thread other than the event loop's; it waits."""
        if self._loop is not None and self._loop.is_running():
            admitting = self.admit(part, thing, needed, what, beside=beside)
            asyncio.run_coroutine_threadsafe(admitting, self._loop).result()
            return
        self._check_possible(thing, needed, what, beside)
        if not self._claim(part, thing, needed):
            raise OutOfMemory(f"{what} needs {_shown(needed)} of the device's memory, which are not free")

    async def _wait_and_claim(self, part: Part, thing: Thing, needed: Needed) -> None:
        """Claim it as soon as it is free. Raises _NothingToFree where it will not be."""
        while True:
            changed = self._changed  # a change from here on is not missed
            if self._claim(part, thing, needed):
                return
            outcome = await self._evict(thing[0])
            if outcome == "nothing":
                raise _NothingToFree
            if outcome == "in_use":
                await changed.wait()

    def _claim(self, part: Part, thing: Thing, needed: Needed) -> bool:
        return self.memory.claim(part, thing, needed.held, loading=needed.loading, picture=needed.picture)

    def _check_possible(self, thing: Thing, needed: Needed, what: str, beside: Collection[Thing]) -> None:
        """Raises OutOfMemory with both sizes if this cannot fit even beside its model alone."""
        most = self.memory.most_bytes(thing, needed, beside)
        if most is not None and needed.held > most:
            raise OutOfMemory(
                f"{what} needs {_shown(needed)} of the device's memory; at most {gib(most)} can be freed "
                "beside what else its request uses and one picture"
            )

    async def _evict(self, model: str) -> Outcome:
        """Have one holder free something, for this model."""
        in_use = False
        for evictors in self._evictors.values():  # by kind: nothing here refers to an unloaded model's LoRAs
            for evictor in tuple(evictors):
                outcome = await evictor(model)
                if outcome == "freed":
                    return outcome
                in_use = in_use or outcome == "in_use"
        return "in_use" if in_use else "nothing"


def _shown(needed: Needed) -> str:
    more = f" (and {gib(needed.loading)} while it is loaded)" if needed.loading else ""
    return f"{gib(needed.held)}{more}"
