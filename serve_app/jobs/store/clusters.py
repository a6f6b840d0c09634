"""The Ray clusters that share a store, as during an upgrade, and which of them runs the jobs of a queue."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis
from redis.typing import EncodableT

from deployments.protocol.errors import NotFound
from serve_app.jobs.store.key_names import Keys
from serve_app.redis.transactions import clock_us, get_hash, redis_errors

Fields = dict[EncodableT, EncodableT]  # of a hash, as redis-py types them

RECORD_TTL_S = 86_400  # of a cluster whose dispatchers are gone


@dataclass(frozen=True, slots=True)
class ClusterRecord:
    """What the store knows of one cluster. Times are those of the server's clock."""

    id: str
    release: str  # version of Weft
    place: str  # where an operator finds it
    since_us: int  # when it came, or was asked to take over
    seen_us: int  # the latest report of one of its dispatchers
    ready: bool  # whether everything that it serves has run at least once
    stopped: bool  # whether an operator wants it to claim nothing more


def choose_cluster(candidates: Iterable[ClusterRecord]) -> str | None:
    """The id of the cluster that claims the jobs of a queue; None: all were stopped.

    It is the newest that is ready. While none is, it is the oldest, so that a new cluster that never becomes
    ready takes nothing from the one before.
    candidates: those whose dispatchers serve the queue now.
    """
    asked = [record for record in candidates if not record.stopped]
    if ready := [record for record in asked if record.ready]:
        return max(ready, key=_age).id
    return min(asked, key=_age).id if asked else None


def _age(record: ClusterRecord) -> tuple[int, str]:
    return record.since_us, record.id


class ClusterRecords:
    """Written by dispatchers each second, and by operators. Raises StoreUnreachable."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    async def report(self, cluster: str, *, release: str, place: str, ready: bool) -> None:
        """Say that this cluster lives; the first time, that it has come. ready: is kept once it is true."""
        record, index = self._keys.cluster(cluster), self._keys.clusters
        with redis_errors():
            now_us = await clock_us(self._redis)
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hsetnx(record, "since_us", str(now_us))
                fields: Fields = {"release": release, "place": place, "seen_us": str(now_us)}
                pipe.hset(record, mapping=fields | {"ready": "1"} if ready else fields)
                pipe.expire(record, RECORD_TTL_S)
                pipe.zadd(index, {cluster: now_us})
                pipe.zremrangebyscore(index, 0, now_us - RECORD_TTL_S * 1_000_000)
                pipe.expire(index, RECORD_TTL_S)
                await pipe.execute()

    async def all(self) -> list[ClusterRecord]:
        """The clusters seen within RECORD_TTL_S, the one that came last at the end."""
        with redis_errors():
            ids = cast(list[str], await self._redis.zrange(self._keys.clusters, 0, -1))
            async with self._redis.pipeline(transaction=False) as pipe:
                for cluster in ids:
                    pipe.hgetall(self._keys.cluster(cluster))
                found = await pipe.execute()
        records = [_record(cluster, fields) for cluster, fields in zip(ids, found, strict=True) if fields]
        return sorted(records, key=_age)

    async def stop(self, cluster: str) -> None:
        """Have this cluster claim no more jobs; those that run there end. Raises NotFound."""
        await self._change(cluster, {"stopped": "1"})

    async def use(self, cluster: str) -> None:
        """Have this cluster claim jobs in place of all others, once it is ready. Raises NotFound."""
        with redis_errors():
            now_us = await clock_us(self._redis)
        await self._change(cluster, {"stopped": "0", "since_us": str(now_us)})

    async def _change(self, cluster: str, fields: Fields) -> None:
        record = self._keys.cluster(cluster)
        with redis_errors():
            if not await get_hash(self._redis, record):
                raise NotFound(
                    f"no cluster {cluster!r} uses this store; weft clusters list names those that do"
                )
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hset(record, mapping=fields)
                pipe.expire(record, RECORD_TTL_S)
                await pipe.execute()


def _record(cluster: str, fields: Mapping[str, str]) -> ClusterRecord:
    return ClusterRecord(
        id=cluster,
        release=fields.get("release", ""),
        place=fields.get("place", ""),
        since_us=int(fields["since_us"]),
        seen_us=int(fields.get("seen_us", "0")),
        ready=fields.get("ready") == "1",
        stopped=fields.get("stopped") == "1",
    )
