"""Client and optimistic transactions: watch, read, decide, write; again after a conflict."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, ResponseError, TimeoutError, WatchError

from deployments.protocol.errors import Overloaded

T = TypeVar("T")

MAX_TRIES = 64  # optimistic retries; forty concurrent writers of one key need about ten
POOL_SIZE = 32  # connections per process; callers beyond wait for one

logger = logging.getLogger(__name__)


class StoreUnreachable(Overloaded):
    """Valkey does not answer, and it is unknown whether the last write took effect: try again."""


def connect(url: str) -> Redis:
    """A client for `url` that connects at first use.

    One immediate retry covers a pooled connection that a restarted server has closed. Longer waits are left
    to the caller: an API call must answer, a worker must not give up.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=POOL_SIZE,
        timeout=5.0,
        decode_responses=True,
        socket_timeout=5.0,
        socket_connect_timeout=2.0,
        retry=Retry(NoBackoff(), 1),
    )
    return Redis.from_pool(pool)


@contextmanager
def redis_errors() -> Iterator[None]:
    """Raise the client's errors as StoreUnreachable and Overloaded."""
    try:
        yield
    except (ConnectionError, TimeoutError, OSError) as error:
        logger.warning("the job store is not reachable: %s", error)
        raise StoreUnreachable("the job store is not reachable; try again", retry_after_s=2.0) from error
    except ResponseError as error:
        # redis-py writes the whole command into a pipeline's error; a prompt must not reach the log
        cause = str(error).rpartition("of pipeline caused error: ")[2]
        logger.error("the job store refused a command", extra={"cause": cause})
        raise Overloaded("the job store refuses to write; try again later", retry_after_s=10.0) from None


async def transact(redis: Redis, watch: list[str], decide: Callable[[Pipeline], Awaitable[T]]) -> T:
    """The result of `decide`, after the commands that it queued were executed without a conflict.

    watch: keys whose change by another client is a conflict.
    decide: reads, then calls `begin` and queues writes, or queues nothing. It runs again after a conflict and
    after a lost connection, so it must recognise its own write.
    Raises StoreUnreachable, and Overloaded after MAX_TRIES conflicts.
    """
    for tries in range(MAX_TRIES):
        with suppress(WatchError):
            return await _transact_once(redis, watch, decide)
        await asyncio.sleep(random.uniform(0.0, 0.0005 * 2 ** min(tries, 6)))
    raise Overloaded("the job store is busy; try again", retry_after_s=1.0)


async def transact_unless_conflict(
    redis: Redis, watch: list[str], decide: Callable[[Pipeline], Awaitable[T]]
) -> T | None:
    """As `transact`, but None after the first conflict: for callers that have something else to try."""
    with suppress(WatchError):
        return await _transact_once(redis, watch, decide)
    return None


async def _transact_once(redis: Redis, watch: list[str], decide: Callable[[Pipeline], Awaitable[T]]) -> T:
    """The result of `decide`. Raises WatchError after a conflict, and when the connection was lost."""
    with redis_errors():
        async with redis.pipeline(transaction=True) as pipe:
            await pipe.watch(*watch)
            result = await decide(pipe)
            if len(pipe):
                await pipe.execute()
            return result


def begin(pipe: Pipeline) -> None:
    """Queue all further commands for one MULTI/EXEC."""
    pipe.multi()  # type: ignore[no-untyped-call]  # redis-py has no annotation here


async def get_hash(redis: Redis | Pipeline, key: str) -> dict[str, str]:
    """The fields of a hash; empty when the key does not exist."""
    return cast(dict[str, str], await redis.hgetall(key))


def time_us(reply: tuple[int, int]) -> int:
    """Microseconds since 1970 of a reply to the command TIME."""
    seconds, microseconds = reply
    return int(seconds) * 1_000_000 + int(microseconds)


async def clock_us(redis: Redis | Pipeline) -> int:
    """The server's clock in microseconds; the clocks of workers may differ or jump."""
    return time_us(await redis.time())


async def clock_s(redis: Redis | Pipeline) -> int:
    """The server's clock in whole seconds."""
    return await clock_us(redis) // 1_000_000
