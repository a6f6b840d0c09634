"""How fast a model's queue moves: what its latest jobs took, and the room its dispatchers tell of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from serve_app.jobs.store.record import Keys
from serve_app.jobs.store.start_estimate import NO_CAPACITY, Capacity, starts_in_s

DURATIONS_KEPT = 32  # jobs per model
DURATIONS_TTL_S = 86_400
CAPACITY_TTL_S = 15  # a dispatcher that was silent for so long has no room


@dataclass(frozen=True, slots=True)
class Throughput:
    """What is known of one model."""

    capacity: Capacity
    recent_s: tuple[float, ...]

    def starts_in_s(self, position: int) -> float | None:
        return starts_in_s(position, self.capacity, self.recent_s)


@dataclass(frozen=True, slots=True)
class Demand:
    """Jobs of one model, or of several that share their replicas."""

    waiting: int = 0
    running: int = 0  # claimed by dispatchers and given to the model

    def __add__(self, other: Demand) -> Demand:
        return Demand(self.waiting + other.waiting, self.running + other.running)


class ThroughputStats:
    """Written by dispatchers, read by everybody. Hints only: nothing is decided for good by them."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    def record_duration(self, pipe: Pipeline, model: str, generation_s: float) -> None:
        """Queue on a pipe that a job has taken so long."""
        durations = self._keys.durations(model)
        pipe.lpush(durations, f"{generation_s:.3f}")
        pipe.ltrim(durations, 0, DURATIONS_KEPT - 1)
        pipe.expire(durations, DURATIONS_TTL_S)

    async def report(self, dispatcher: str, capacities: Mapping[str, Capacity]) -> None:
        """One dispatcher's room, per model."""
        seconds, _ = await self._redis.time()
        async with self._redis.pipeline(transaction=False) as pipe:
            for model, capacity in capacities.items():
                pipe.hset(
                    self._keys.capacity(model), dispatcher, f"{capacity.slots} {capacity.free} {seconds}"
                )
                pipe.expire(self._keys.capacity(model), CAPACITY_TTL_S)
            await pipe.execute()

    async def running(self, models: Sequence[str]) -> dict[str, int]:
        """Jobs that all dispatchers together run, per model, as they told."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for model in models:
                pipe.hgetall(self._keys.capacity(model))
            pipe.time()
            *reported, (seconds, _) = await pipe.execute()
        return {
            model: capacity.slots - capacity.free
            for model, fields in zip(models, reported, strict=True)
            for capacity in [_total_capacity(fields, int(seconds))]
        }

    async def read(self, redis: Redis | Pipeline, model: str) -> Throughput:
        """What is known now."""
        recent = cast(list[str], await redis.lrange(self._keys.durations(model), 0, -1))
        reported = cast(dict[str, str], await redis.hgetall(self._keys.capacity(model)))
        seconds, _ = await redis.time()
        return Throughput(_total_capacity(reported, int(seconds)), tuple(float(value) for value in recent))


def _total_capacity(reported: Mapping[str, str], now_s: int) -> Capacity:
    """Of all dispatchers that told of theirs lately."""
    capacity = NO_CAPACITY
    for fields in reported.values():
        slots, free, reported_at = (int(word) for word in fields.split())
        if now_s - reported_at <= CAPACITY_TTL_S:
            capacity += Capacity(slots, free)
    return capacity
