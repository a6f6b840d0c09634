"""How fast a model's queue moves: what its latest jobs took, and the room its dispatchers tell of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from serve_app.jobs.forecast import NO_ROOM, Room, starts_in_s
from serve_app.jobs.record import Keys

REMEMBERED = 32  # jobs per model
PACE_TTL_S = 86_400
ROOM_TTL_S = 15  # a dispatcher that was silent for so long has no room


@dataclass(frozen=True, slots=True)
class Pace:
    """What is known of one model."""

    room: Room
    recent_s: tuple[float, ...]

    def starts_in_s(self, position: int) -> float | None:
        return starts_in_s(position, self.room, self.recent_s)


@dataclass(frozen=True, slots=True)
class Demand:
    """Jobs of one model, or of several that share their replicas."""

    waiting: int = 0
    running: int = 0  # claimed by dispatchers and given to the model

    def __add__(self, other: Demand) -> Demand:
        return Demand(self.waiting + other.waiting, self.running + other.running)


class Paces:
    """Written by dispatchers, read by everybody. Hints only: nothing is decided for good by them."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    def note(self, pipe: Pipeline, model: str, generation_s: float) -> None:
        """Queue on a pipe that a job has taken so long."""
        pace = self._keys.pace(model)
        pipe.lpush(pace, f"{generation_s:.3f}")
        pipe.ltrim(pace, 0, REMEMBERED - 1)
        pipe.expire(pace, PACE_TTL_S)

    async def tell(self, dispatcher: str, rooms: Mapping[str, Room]) -> None:
        """One dispatcher's room, per model."""
        seconds, _ = await self._redis.time()
        async with self._redis.pipeline(transaction=False) as pipe:
            for model, room in rooms.items():
                pipe.hset(self._keys.room(model), dispatcher, f"{room.slots} {room.free} {seconds}")
                pipe.expire(self._keys.room(model), ROOM_TTL_S)
            await pipe.execute()

    async def running(self, models: Sequence[str]) -> dict[str, int]:
        """Jobs that all dispatchers together run, per model, as they told."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for model in models:
                pipe.hgetall(self._keys.room(model))
            pipe.time()
            *told, (seconds, _) = await pipe.execute()
        return {
            model: room.slots - room.free
            for model, words in zip(models, told, strict=True)
            for room in [_room(words, int(seconds))]
        }

    async def read(self, redis: Redis | Pipeline, model: str) -> Pace:
        """What is known now."""
        recent = cast(list[str], await redis.lrange(self._keys.pace(model), 0, -1))
        told = cast(dict[str, str], await redis.hgetall(self._keys.room(model)))
        seconds, _ = await redis.time()
        return Pace(_room(told, int(seconds)), tuple(float(value) for value in recent))


def _room(told: Mapping[str, str], now_s: int) -> Room:
    """Of all dispatchers that told of theirs lately."""
    room = NO_ROOM
    for words in told.values():
        slots, free, said_at = (int(word) for word in words.split())
        if now_s - said_at <= ROOM_TTL_S:
            room += Room(slots, free)
    return room
