"""How fast each model's queue moves, as the store knows it: durations, capacity reports and queue lengths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from serve_app.jobs.store.key_names import Keys
from serve_app.jobs.store.start_estimate import (
    CAPACITY_TTL_S,
    Capacity,
    Demand,
    Throughput,
    cluster_of,
    encode_report,
    reporting_clusters,
    total_capacity,
)
from serve_app.redis.transactions import clock_s, redis_errors

DURATIONS_KEPT = 32  # jobs per model
DURATIONS_TTL_S = 86_400


class ThroughputStats:
    """Written by dispatchers, read by all processes. Estimates only: no job's fate depends on them."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    def record_duration(self, pipe: Pipeline, model: str, generation_s: float) -> None:
        """Queue on a pipe that a job of this model took so many seconds."""
        durations = self._keys.durations(model)
        pipe.lpush(durations, f"{generation_s:.3f}")
        pipe.ltrim(durations, 0, DURATIONS_KEPT - 1)
        pipe.expire(durations, DURATIONS_TTL_S)

    async def report(self, dispatcher: str, capacities: Mapping[str, Capacity]) -> None:
        """Store one dispatcher's capacity per model; it expires after CAPACITY_TTL_S."""
        with redis_errors():
            now_s = await clock_s(self._redis)
            async with self._redis.pipeline(transaction=False) as pipe:
                for model, capacity in capacities.items():
                    pipe.hset(self._keys.capacity(model), dispatcher, encode_report(capacity, now_s))
                    pipe.expire(self._keys.capacity(model), CAPACITY_TTL_S)
                await pipe.execute()

    async def withdraw(self, dispatcher: str, models: Iterable[str]) -> None:
        """Remove one dispatcher's capacity of these models, for it has ended."""
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for model in models:
                    pipe.hdel(self._keys.capacity(model), dispatcher)
                await pipe.execute()

    async def clusters_of(self, queues: Sequence[str]) -> dict[str, set[str]]:
        """By queue, the clusters whose dispatchers serve it now."""
        found, now_s = await self._reports(queues)
        return {queue: reporting_clusters(reports, now_s) for queue, reports in found.items()}

    async def read(self, redis: Redis | Pipeline, model: str) -> Throughput:
        """What is known of a model now. redis: a client, or a pipe that watches."""
        recent = cast(list[str], await redis.lrange(self._keys.durations(model), 0, -1))
        reports = cast(dict[str, str], await redis.hgetall(self._keys.capacity(model)))
        capacity = total_capacity(reports.values(), await clock_s(redis))
        return Throughput(capacity, tuple(float(value) for value in recent))

    async def starts_in_s(self, model: str, position: int) -> float | None:
        """Seconds until the job at this queue position (1: next) probably starts; None: unknown."""
        with redis_errors():
            throughput = await self.read(self._redis, model)
        return throughput.starts_in_s(position)

    async def queued(self, models: Sequence[str]) -> dict[str, int]:
        """How many jobs wait for each model."""
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for model in models:
                    pipe.zcard(self._keys.pending_of(model))
                return dict(zip(models, await pipe.execute(), strict=True))

    async def demand(self, models: Sequence[str], cluster: str | None = None) -> dict[str, Demand]:
        """Waiting jobs of each model, and those that its dispatchers run; autoscaling reads it.

        cluster: counts the jobs that run there; None: those of all clusters.
        """
        waiting = await self.queued(models)
        found, now_s = await self._reports(models)
        running = {
            model: total_capacity(
                (
                    report
                    for name, report in reports.items()
                    if cluster is None or cluster_of(name) == cluster
                ),
                now_s,
            ).running
            for model, reports in found.items()
        }
        return {model: Demand(waiting[model], running[model]) for model in models}

    async def _reports(self, queues: Sequence[str]) -> tuple[dict[str, dict[str, str]], int]:
        """By queue and dispatcher the stored reports, and the server's time in seconds."""
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for queue in queues:
                    pipe.hgetall(self._keys.capacity(queue))
                found = await pipe.execute()
            return dict(zip(queues, found, strict=True)), await clock_s(self._redis)
