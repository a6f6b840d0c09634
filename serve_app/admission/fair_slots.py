"""Slots of one process that owners share, so that no owner's slow work keeps all others waiting."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from deployments.protocol.errors import Overloaded

RETRY_AFTER_S = 5.0


@dataclass(eq=False, slots=True)
class _Waiter:
    owner: str
    granted: asyncio.Future[None]


class FairSlots:
    """At most `total` at once, and of one owner at most `per_owner`.

    A caller that finds none free waits. A slot that becomes free goes to the waiting owner who holds the
    fewest, and among these to the first who came.
    """

    def __init__(self, total: int, per_owner: int, wait_s: float, work: str) -> None:
        """work: what holds a slot, in the plural, for messages."""
        self._total = total
        self._per_owner = per_owner
        self._wait_s = wait_s
        self._work = work
        self._held: Counter[str] = Counter()
        self._waiting: list[_Waiter] = []

    @asynccontextmanager
    async def hold(self, owner: str) -> AsyncIterator[None]:
        """Hold a slot while this is open. Raises Overloaded where none is free within the wait."""
        await self._acquire(_Waiter(owner, asyncio.get_running_loop().create_future()))
        try:
            yield
        finally:
            self._release(owner)

    async def _acquire(self, waiter: _Waiter) -> None:
        self._waiting.append(waiter)
        self._grant()
        try:
            async with asyncio.timeout(self._wait_s):
                await waiter.granted
        except BaseException as error:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            else:  # granted in the same turn of the loop
                self._release(waiter.owner)
            if isinstance(error, TimeoutError):
                raise self._overloaded(waiter.owner) from None
            raise

    def _release(self, owner: str) -> None:
        self._held[owner] -= 1
        self._held += Counter()  # drops owners without any
        self._grant()

    def _grant(self) -> None:
        while self._held.total() < self._total:
            able = [
                w for w in self._waiting if not w.granted.done() and self._held[w.owner] < self._per_owner
            ]
            if not able:
                return
            first = min(able, key=lambda waiter: self._held[waiter.owner])
            self._waiting.remove(first)
            self._held[first.owner] += 1
            first.granted.set_result(None)

    def _overloaded(self, owner: str) -> Overloaded:
        at_share = self._held[owner] >= self._per_owner
        count, whose = (self._per_owner, " of yours") if at_share else (self._total, "")
        return Overloaded(
            f"{count} {self._work}{whose} are in progress, which is the limit; try again",
            retry_after_s=RETRY_AFTER_S,
        )
