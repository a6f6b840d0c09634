"""Slots of one process that owners share, so that no owner's slow work keeps all others waiting."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deployments.protocol.errors import Overloaded

RETRY_AFTER_S = 5.0


class FairSlots:
    """At most `total` at once, and of one owner at most `per_owner`.

    A caller that finds none free waits. An owner that waits for its own work stands in the way of no other.
    """

    def __init__(self, total: int, per_owner: int, wait_s: float, work: str) -> None:
        """work: what holds a slot, in the plural, for messages."""
        self._total = total
        self._per_owner = per_owner
        self._wait_s = wait_s
        self._work = work
        self._held: Counter[str] = Counter()
        self._waiting: list[asyncio.Future[None]] = []

    @asynccontextmanager
    async def hold(self, owner: str) -> AsyncIterator[None]:
        """Hold a slot while this is open. Raises Overloaded where none is free within the wait."""
        try:
            async with asyncio.timeout(self._wait_s) as waiting:
                await self._acquire(owner)
        except TimeoutError:
            if not waiting.expired():
                raise
            raise self._overloaded(owner) from None
        try:
            yield
        finally:
            self._held[owner] -= 1
            self._held += Counter()  # drops owners without any
            self._wake()

    async def _acquire(self, owner: str) -> None:
        while self._held.total() >= self._total or self._held[owner] >= self._per_owner:
            woken = asyncio.get_running_loop().create_future()
            self._waiting.append(woken)
            await woken
        self._held[owner] += 1

    def _wake(self) -> None:
        woken, self._waiting = self._waiting, []
        for waiter in woken:
            if not waiter.done():
                waiter.set_result(None)

    def _overloaded(self, owner: str) -> Overloaded:
        whose = "of yours are" if self._held[owner] >= self._per_owner else "are"
        count = self._per_owner if self._held[owner] >= self._per_owner else self._total
        return Overloaded(
            f"{count} {self._work} {whose} in progress, which is the limit; try again",
            retry_after_s=RETRY_AFTER_S,
        )
