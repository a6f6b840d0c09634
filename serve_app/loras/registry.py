"""The registry of LoRAs in Valkey: their owners and names, and the holds on their files."""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from deployments.protocol.errors import Conflict, NotFound, Overloaded, QuotaExceeded
from deployments.protocol.request import DIGEST
from serve_app.loras.record import LORA_RECORD, PUBLIC, LoraRecord, lora_id
from serve_app.redis.transactions import StoreUnreachable, begin, clock_s, redis_errors, transact

HOLD_S = 900  # a hold that its process never released expires
REMOVAL_S = 120  # so does a removal


class LoraRegistry:
    """Records, names, previews and holds. Every method raises StoreUnreachable when Valkey cannot be
    reached."""

    def __init__(self, redis: Redis, prefix: str, max_per_owner: int) -> None:
        self._redis = redis  # from redis.transactions.connect
        self._prefix = prefix
        self._max_per_owner = max_per_owner

    async def add(self, record: LoraRecord, preview: bytes | None = None) -> LoraRecord:
        """The LoRA as it is registered now; adding the same file again updates its record.

        preview: a small WebP picture; None keeps the present one.
        Raises Conflict when another LoRA of the owner has the name, QuotaExceeded past max_per_owner.
        """
        records, names = self._records(record.owner), self._names(record.owner)
        name = record.name.casefold()

        async def decide(pipe: Pipeline) -> LoraRecord:
            known = cast("str | None", await pipe.hget(records, record.id))
            taken = await pipe.hget(names, name)
            if taken not in (None, record.id):
                raise Conflict(
                    f"you have another adapter called {record.name!r}; delete it, or choose another name",
                    param="name",
                )
            if known is None and await pipe.hlen(records) >= self._max_per_owner:
                raise QuotaExceeded(
                    f"there are {self._max_per_owner} adapters, which is the limit; delete one first"
                )
            before = None if known is None else LORA_RECORD.validate_json(known)
            created = float(await clock_s(pipe)) if before is None else before.created_at
            shown = preview is not None or (before is not None and before.preview)
            kept = replace(record, created_at=created, preview=shown)
            begin(pipe)
            if before is not None and before.name.casefold() != name:
                pipe.hdel(names, before.name.casefold())
            pipe.hset(records, record.id, LORA_RECORD.dump_json(kept).decode())
            pipe.hset(names, name, record.id)
            if preview is not None:
                pipe.hset(self._previews(record.owner), record.id, base64.b64encode(preview).decode())
            pipe.sadd(self._owners, record.owner)
            return kept

        return await transact(self._redis, [records, names], decide)

    async def find(self, id_or_name: str, owner: str) -> LoraRecord | None:
        """The owner's own LoRA with this id, digest or name, else the public one."""
        if re.fullmatch(DIGEST, id_or_name):
            id_or_name = lora_id(id_or_name)
        with redis_errors():
            for scope in (owner, PUBLIC):
                found = await self._redis.hget(self._records(scope), id_or_name)
                if found is None:
                    by_name = await self._redis.hget(self._names(scope), id_or_name.casefold())
                    found = by_name and await self._redis.hget(self._records(scope), by_name)
                if found is not None:
                    return LORA_RECORD.validate_json(found)
        return None

    async def list(self, owner: str) -> list[LoraRecord]:
        """The owner's own, then the public ones, each by name."""
        with redis_errors():
            found = [
                [LORA_RECORD.validate_json(v) for v in (await self._redis.hvals(self._records(scope)))]
                for scope in (owner, PUBLIC)
            ]
        return [record for part in found for record in sorted(part, key=lambda a: a.name.casefold())]

    async def remove(self, record: LoraRecord) -> None:
        """Delete the record. Raises NotFound when another call has deleted it."""
        records, names = self._records(record.owner), self._names(record.owner)

        async def decide(pipe: Pipeline) -> None:
            known = await pipe.hget(records, record.id)
            if known is None:
                raise NotFound("there is no such adapter any more")
            begin(pipe)
            pipe.hdel(records, record.id)
            pipe.hdel(self._previews(record.owner), record.id)
            pipe.hdel(names, LORA_RECORD.validate_json(known).name.casefold())

        await transact(self._redis, [records, names], decide)

    async def preview(self, record: LoraRecord) -> bytes:
        """Its WebP picture. Raises NotFound."""
        with redis_errors():
            text = await self._redis.hget(self._previews(record.owner), record.id)
        if text is None:
            raise NotFound("this adapter has no preview")
        return base64.b64decode(text)

    async def digests(self) -> set[str]:
        """SHA-256 (hex) of every registered file, of all owners."""
        found: set[str] = set()
        with redis_errors():
            for owner in cast(set[str], await self._redis.smembers(self._owners)):
                for record in await self._redis.hvals(self._records(owner)):
                    found.add(LORA_RECORD.validate_json(record).digest)
        return found

    @asynccontextmanager
    async def hold(self, digest: str) -> AsyncIterator[None]:
        """No process removes the file while this is open. Raises Overloaded while one is removing it."""
        held, removal, token = self._held(digest), self._removal(digest), secrets.token_hex(8)

        async def decide(pipe: Pipeline) -> None:
            if await pipe.exists(removal):
                raise Overloaded("this adapter is being deleted right now; try again", retry_after_s=1.0)
            now = float(await clock_s(pipe))
            begin(pipe)
            pipe.zadd(held, {token: now + HOLD_S})
            pipe.zremrangebyscore(held, "-inf", now)
            pipe.expire(held, 2 * HOLD_S)

        await transact(self._redis, [removal], decide)
        try:
            yield
        finally:
            with suppress(StoreUnreachable), redis_errors():
                await self._redis.zrem(held, token)

    @asynccontextmanager
    async def begin_removal(self, digest: str) -> AsyncIterator[bool]:
        """True, and no hold can be taken while this is open; False where the file is held or being
        removed."""
        held, removal, token = self._held(digest), self._removal(digest), secrets.token_hex(8)

        async def decide(pipe: Pipeline) -> bool:
            now = float(await clock_s(pipe))
            if await pipe.zcount(held, now, "inf") or await pipe.get(removal) not in (None, token):
                return False
            begin(pipe)
            pipe.set(removal, token, ex=REMOVAL_S)
            return True

        acquired = await transact(self._redis, [held, removal], decide)
        try:
            yield acquired
        finally:
            if acquired:
                with suppress(StoreUnreachable), redis_errors():
                    await self._redis.delete(removal)

    def _records(self, owner: str) -> str:
        """HASH: LoRA id -> record."""
        return f"{self._prefix}adapters:{owner}"

    def _previews(self, owner: str) -> str:
        """HASH: LoRA id -> small WebP picture in base64."""
        return f"{self._prefix}adapter-previews:{owner}"

    def _names(self, owner: str) -> str:
        """HASH: case-folded name -> LoRA id."""
        return f"{self._prefix}adapter-names:{owner}"

    @property
    def _owners(self) -> str:
        """SET of owners who have, or had, a LoRA."""
        return f"{self._prefix}adapter-owners"

    def _held(self, digest: str) -> str:
        """ZSET: token of a hold -> unix seconds of its end."""
        return f"{self._prefix}adapter-held:{digest}"

    def _removal(self, digest: str) -> str:
        """STRING: token of the process that is removing the file."""
        return f"{self._prefix}adapter-doomed:{digest}"
