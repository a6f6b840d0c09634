"""Wake-ups between processes: one Redis subscription per process, shared by any number of waiters.

A wake-up may be lost or arrive twice. A waiter therefore reads the store after each one, and polls it in
between.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from redis.asyncio import Redis
from redis.exceptions import RedisError

from serve_app.redis.cancellation import raise_if_cancelled

RECONNECT_S = 0.2

logger = logging.getLogger(__name__)


class Wakeups:
    """Sets the events of the waiters of a key when the key's name arrives on the channel."""

    def __init__(self, redis: Redis, channel: str) -> None:
        self._redis = redis
        self._channel = channel
        self._waiters: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._subscribed = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    @contextmanager
    def subscribe(self, key: str) -> Iterator[asyncio.Event]:
        """An event that is set at every wake-up of `key` until the block ends."""
        event = asyncio.Event()
        self._waiters[key].add(event)
        try:
            yield event
        finally:
            self._waiters[key].discard(event)
            if not self._waiters[key]:
                del self._waiters[key]

    async def ensure_subscribed(self, timeout_s: float = 1.0) -> None:
        """Return once wake-ups arrive, or after timeout_s: until then waiters depend on polling."""
        if self._reader is None or self._reader.done():
            # Serve cancels tasks that carry a request's context when its client disconnects
            self._reader = asyncio.create_task(self._read(), context=contextvars.Context())
        if not self._subscribed.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._subscribed.wait()

    async def aclose(self) -> None:
        """End the subscription."""
        while self._reader is not None and not self._reader.done():
            self._reader.cancel()  # again, should the client have swallowed it while it connected
            await asyncio.wait({self._reader}, timeout=1.0)

    async def _read(self) -> None:
        while True:
            try:
                await self._read_until_lost()
            except (RedisError, OSError) as error:
                logger.info("wake-up subscription lost", extra={"error": type(error).__name__})
            raise_if_cancelled()
            self._subscribed.clear()
            await asyncio.sleep(RECONNECT_S)

    async def _read_until_lost(self) -> None:
        async with self._redis.pubsub() as pubsub:
            await pubsub.subscribe(self._channel)
            async for message in pubsub.listen():
                if message["type"] == "subscribe":
                    self._subscribed.set()
                    for key in list(self._waiters):  # earlier wake-ups are lost: every waiter reads the store
                        self._wake(key)
                elif message["type"] == "message":
                    self._wake(message["data"])

    def _wake(self, key: str) -> None:
        for event in self._waiters.get(key, ()):
            event.set()


async def wait_for_wakeup(event: asyncio.Event, timeout_s: float) -> bool:
    """Whether the event was set within timeout_s; it is cleared again."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):  # Python 3.11's wait_for may swallow a cancellation
            await event.wait()
    was_set = event.is_set()
    event.clear()
    return was_set
