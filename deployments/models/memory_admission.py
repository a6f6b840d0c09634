"""Who gets memory of the device, and who gives way: idle LoRAs first, then idle ControlNets, refiners and
preprocessors, then idle models."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Literal, get_args

from deployments.models.device_memory import DeviceMemory, Needed, Part, Thing, gib
from deployments.protocol.errors import OutOfMemory, Overloaded

logger = logging.getLogger(__name__)

WAIT_S = 60.0  # for memory that running requests hold; then the request is refused

# what a holder did for a model that needs memory: it freed some; it will, when a running request of another
# model or LoRA ends; it has none to give
Outcome = Literal["freed", "in_use", "nothing"]
Evictor = Callable[[str], Awaitable[Outcome]]
Kind = Literal["loras", "extras", "models"]  # of holders, in the order in which they are asked


class MemoryAdmission:
    """Admits weights and LoRAs to the device. One event loop, set by `enter_loop`, does all waiting."""

    def __init__(self, memory: DeviceMemory, wait_s: float = WAIT_S) -> None:
        """wait_s: how long a request waits for memory that others hold."""
        self.memory = memory
        self._wait_s = wait_s
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
        release before. Raises OutOfMemory where it can never fit beside
        its model, Overloaded if running requests do not free enough in time.
        """
        self._check_possible(thing, needed, what, beside)
        try:
            async with asyncio.timeout(None if unlimited_wait else self._wait_s):
                while True:
                    changed = self._changed  # a change from here on is not missed
                    if self._claim(part, thing, needed):
                        return
                    outcome = await self._evict(thing[0])
                    if outcome == "nothing":
                        raise TimeoutError
                    if outcome == "in_use":
                        await changed.wait()
        except TimeoutError:
            raise Overloaded(
                f"{what} needs {_shown(needed)} of the device's memory, which running requests hold; "
                "try again later",
                retry_after_s=self._wait_s,
            ) from None

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
        for evictor in [one for evictors in self._evictors.values() for one in evictors]:
            outcome = await evictor(model)
            if outcome == "freed":
                return outcome
            in_use = in_use or outcome == "in_use"
        return "in_use" if in_use else "nothing"


def _shown(needed: Needed) -> str:
    more = f" (and {gib(needed.loading)} while it is loaded)" if needed.loading else ""
    return f"{gib(needed.held)}{more}"
