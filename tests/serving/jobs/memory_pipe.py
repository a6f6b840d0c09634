"""A pipe that applies its commands to dicts at once: what a transaction has written, without a server."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any


class MemoryPipe:
    """The commands that transitions queue. Every value is a string, as a server would return it."""

    def __init__(self) -> None:
        self.hashes: defaultdict[str, dict[str, str]] = defaultdict(dict)
        self.zsets: defaultdict[str, dict[str, float]] = defaultdict(dict)
        self.sets: defaultdict[str, set[str]] = defaultdict(set)
        self.strings: dict[str, str] = {}
        self.streams: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
        self.ttl_s: dict[str, int] = {}
        self.published: list[tuple[str, str]] = []

    def exists(self, key: str) -> bool:
        return any(
            key in kind and kind[key] for kind in (self.hashes, self.zsets, self.sets, self.strings)
        ) or bool(self.streams.get(key))

    def hset(self, key: str, field: str = "", value: str = "", mapping: Mapping[Any, Any] = {}) -> None:
        fields = {field: value} if field else dict(mapping)
        assert all(isinstance(text, str) and text for text in fields.values()), "a server stores strings"
        self.hashes[key] |= fields

    def hdel(self, key: str, *fields: str) -> None:
        for field in fields:
            self.hashes[key].pop(field, None)

    def hincrby(self, key: str, field: str, amount: int) -> None:
        self.hashes[key][field] = str(int(self.hashes[key].get(field, "0")) + amount)

    def zadd(self, key: str, scores: Mapping[str, float]) -> None:
        self.zsets[key] |= scores

    def zrem(self, key: str, member: str) -> None:
        assert isinstance(member, str)
        self.zsets[key].pop(member, None)

    def zremrangebyscore(self, key: str, low: float, high: float) -> None:
        self.zsets[key] = {m: s for m, s in self.zsets[key].items() if not low <= s <= high}

    def sadd(self, key: str, member: str) -> None:
        self.sets[key].add(member)

    def srem(self, key: str, member: str) -> None:
        self.sets[key].discard(member)

    def set(self, key: str, value: str, ex: int | None = None) -> None:
        self.strings[key] = value
        self.ttl_s.pop(key, None)
        if ex is not None:
            self.ttl_s[key] = ex

    def incr(self, key: str) -> None:
        self.strings[key] = str(int(self.strings.get(key, "0")) + 1)

    def lpush(self, key: str, value: str) -> None:
        self.streams[key].insert(0, {"value": value})

    def ltrim(self, key: str, first: int, last: int) -> None:
        self.streams[key] = self.streams[key][first : last + 1]

    def delete(self, *keys: str) -> None:
        for key in keys:
            for kind in (self.hashes, self.zsets, self.sets, self.strings, self.streams, self.ttl_s):
                kind.pop(key, None)  # type: ignore[attr-defined]

    def expire(self, key: str, ttl_s: int) -> None:
        assert isinstance(ttl_s, int)
        if self.exists(key):
            self.ttl_s[key] = ttl_s

    def xadd(self, key: str, fields: Mapping[Any, Any], maxlen: int, approximate: bool) -> None:
        assert approximate is False
        self.streams[key].append({str(k): str(v) for k, v in fields.items()})
        self.streams[key] = self.streams[key][-maxlen:]

    def publish(self, channel: str, message: str) -> None:
        self.published.append((channel, message))
