"""Who gets memory of the device, and who gives way: idle LoRAs first, then idle models."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Literal

from deployments.models.device_memory import DeviceMemory, Part, Thing, gib
from deployments.protocol.errors import OutOfMemory, Overloaded

logger = logging.getLogger(__name__)

WAIT_S = 60.0  # for memory that running requests hold; then the request is refused

# what a holder did for a model that needs memory: it freed some; it will, when a running request of another
# model or LoRA ends; it has none to give
Outcome = Literal["freed", "in_use", "nothing"]
Evictor = Callable[[str], Awaitable[Outcome]]


class MemoryAdmission:
    """Admits weights and LoRAs to the device. One event loop, set by `enter_loop`, does all waiting."""

    def __init__(self, memory: DeviceMemory, wait_s: float = WAIT_S) -> None:
        """wait_s: how long a request waits for memory that others hold."""
        self.memory = memory
        self._wait_s = wait_s
        self._evictors: list[Evictor] = []  # asked in this order
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()

    def enter_loop(self) -> None:
        """Admissions of other threads run on the current event loop from now on."""
        self._loop = asyncio.get_running_loop()

    def add_evictor(self, evictor: Evictor, *, first: bool = False) -> Callable[[], None]:
        """Ask this holder when memory is needed, until the returned function is called.

        first: before those that were added earlier.
        """
        self._evictors.insert(0 if first else len(self._evictors), evictor)
        return lambda: self._evictors.remove(evictor)

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
        self, part: Part, thing: Thing, size_bytes: int, what: str, *, unlimited_wait: bool = False
    ) -> None:
        """Claim so many bytes for a thing; what is idle is evicted for it.

        what: names it in messages, such as "the LoRA 1f3c". Raises OutOfMemory where it can never fit beside
        its model, Overloaded if running requests do not free enough in time.
        """
        self._check_possible(thing, size_bytes, what)
        try:
            async with asyncio.timeout(None if unlimited_wait else self._wait_s):
                while True:
                    changed = self._changed  # a change from here on is not missed
                    if self.memory.claim(part, thing, size_bytes):
                        return
                    outcome = await self._evict(thing[0])
                    if outcome == "nothing":
                        raise TimeoutError
                    if outcome == "in_use":
                        await changed.wait()
        except TimeoutError:
            raise Overloaded(
                f"{what} needs {gib(size_bytes)} of the device's memory, which running requests hold; "
                "try again later",
                retry_after_s=self._wait_s,
            ) from None

    def admit_from_thread(self, part: Part, thing: Thing, size_bytes: int, what: str) -> None:
        """As `admit`, for a thread other than the event loop's; it waits."""
        if self._loop is not None and self._loop.is_running():
            admitting = self.admit(part, thing, size_bytes, what)
            asyncio.run_coroutine_threadsafe(admitting, self._loop).result()
            return
        self._check_possible(thing, size_bytes, what)
        if not self.memory.claim(part, thing, size_bytes):
            raise OutOfMemory(f"{what} needs {gib(size_bytes)} of the device's memory, which are not free")

    def _check_possible(self, thing: Thing, size_bytes: int, what: str) -> None:
        """Raises OutOfMemory with both sizes if this cannot fit even beside its model alone."""
        most = self.memory.most_bytes(thing)
        if most is not None and size_bytes > most:
            raise OutOfMemory(
                f"{what} needs {gib(size_bytes)} of the device's memory; at most {gib(most)} can be freed "
                "beside the rest of its model and one picture"
            )

    async def _evict(self, model: str) -> Outcome:
        """Have one holder free something, for this model."""
        in_use = False
        for evictor in list(self._evictors):
            outcome = await evictor(model)
            if outcome == "freed":
                return outcome
            in_use = in_use or outcome == "in_use"
        return "in_use" if in_use else "nothing"
