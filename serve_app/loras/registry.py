"""The register of adapters, in Valkey: who owns which, under which name, and which files are held."""

from __future__ import annotations

import base64
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from deployments.protocol.errors import Conflict, NotFound, Overloaded, QuotaExceeded
from serve_app.loras.record import DIGEST, LORA_RECORD, PUBLIC, LoraRecord, lora_id
from serve_app.redis.transactions import StoreUnreachable, begin, redis_errors, transact

HOLD_S = 900  # a hold that its process never gave back ends by itself
DOOMED_S = 120  # so does a removal


class LoraRegistry:
    """All changes of the register. Raises StoreUnreachable when it cannot be asked."""

    def __init__(self, redis: Redis, prefix: str, max_per_owner: int) -> None:
        self._redis = redis  # made by transaction.connect
        self._prefix = prefix
        self._max_per_owner = max_per_owner

    async def add(self, adapter: LoraRecord, preview: bytes | None = None) -> LoraRecord:
        """The adapter as it is registered now; the same file again changes what is said of it.

        preview: a small picture; None keeps the one there is.

        Raises Conflict when another one of the owner has the name, QuotaExceeded past max_per_owner.
        """
        records, names = self._records(adapter.owner), self._names(adapter.owner)
        name = adapter.name.casefold()

        async def decide(pipe: Pipeline) -> LoraRecord:
            known = cast("str | None", await pipe.hget(records, adapter.id))
            taken = await pipe.hget(names, name)
            if taken not in (None, adapter.id):
                raise Conflict(
                    f"you have another adapter called {adapter.name!r}; delete it, or choose another name",
                    param="name",
                )
            if known is None and await pipe.hlen(records) >= self._max_per_owner:
                raise QuotaExceeded(
                    f"there are {self._max_per_owner} adapters, which is the limit; delete one first"
                )
            before = None if known is None else LORA_RECORD.validate_json(known)
            created = float((await pipe.time())[0]) if before is None else before.created_at
            shown = preview is not None or (before is not None and before.preview)
            kept = replace(adapter, created_at=created, preview=shown)
            begin(pipe)
            if before is not None and before.name.casefold() != name:
                pipe.hdel(names, before.name.casefold())
            pipe.hset(records, adapter.id, LORA_RECORD.dump_json(kept).decode())
            pipe.hset(names, name, adapter.id)
            if preview is not None:
                pipe.hset(self._previews(adapter.owner), adapter.id, base64.b64encode(preview).decode())
            pipe.sadd(self._owners, adapter.owner)
            return kept

        return await transact(self._redis, [records, names], decide)

    async def find(self, id_or_name: str, owner: str) -> LoraRecord | None:
        """The owner's own adapter with this id, digest or name, else the public one."""
        if DIGEST.fullmatch(id_or_name):
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
        return [adapter for part in found for adapter in sorted(part, key=lambda a: a.name.casefold())]

    async def remove(self, adapter: LoraRecord) -> None:
        """Forget it. Raises NotFound when somebody was faster."""
        records, names = self._records(adapter.owner), self._names(adapter.owner)

        async def decide(pipe: Pipeline) -> None:
            known = await pipe.hget(records, adapter.id)
            if known is None:
                raise NotFound("there is no such adapter any more")
            begin(pipe)
            pipe.hdel(records, adapter.id)
            pipe.hdel(self._previews(adapter.owner), adapter.id)
            pipe.hdel(names, LORA_RECORD.validate_json(known).name.casefold())

        await transact(self._redis, [records, names], decide)

    async def preview(self, adapter: LoraRecord) -> bytes:
        """Its picture. Raises NotFound."""
        with redis_errors():
            text = await self._redis.hget(self._previews(adapter.owner), adapter.id)
        if text is None:
            raise NotFound("this adapter has no preview")
        return base64.b64decode(text)

    async def digests(self) -> set[str]:
        """Of every registered file, whoever owns it."""
        found: set[str] = set()
        with redis_errors():
            for owner in cast(set[str], await self._redis.smembers(self._owners)):
                for record in await self._redis.hvals(self._records(owner)):
                    found.add(LORA_RECORD.validate_json(record).digest)
        return found

    @asynccontextmanager
    async def hold(self, digest: str) -> AsyncIterator[None]:
        """While this is open nobody removes the file. Raises Overloaded while that is happening."""
        held, doomed, token = self._held(digest), self._doomed(digest), secrets.token_hex(8)

        async def decide(pipe: Pipeline) -> None:
            if await pipe.exists(doomed):
                raise Overloaded("this adapter is being deleted right now; try again", retry_after_s=1.0)
            now = float((await pipe.time())[0])
            begin(pipe)
            pipe.zadd(held, {token: now + HOLD_S})
            pipe.zremrangebyscore(held, "-inf", now)
            pipe.expire(held, 2 * HOLD_S)

        await transact(self._redis, [doomed], decide)
        try:
            yield
        finally:
            with suppress(StoreUnreachable), redis_errors():
                await self._redis.zrem(held, token)

    @asynccontextmanager
    async def begin_removal(self, digest: str) -> AsyncIterator[bool]:
        """True, and nobody may hold the file while this is open; False where somebody does already."""
        held, doomed, token = self._held(digest), self._doomed(digest), secrets.token_hex(8)

        async def decide(pipe: Pipeline) -> bool:
            now = float((await pipe.time())[0])
            if await pipe.zcount(held, now, "inf") or await pipe.get(doomed) not in (None, token):
                return False
            begin(pipe)
            pipe.set(doomed, token, ex=DOOMED_S)
            return True

        mine = await transact(self._redis, [held, doomed], decide)
        try:
            yield mine
        finally:
            if mine:
                with suppress(StoreUnreachable), redis_errors():
                    await self._redis.delete(doomed)

    def _records(self, owner: str) -> str:
        """HASH: adapter id -> record."""
        return f"{self._prefix}adapters:{owner}"

    def _previews(self, owner: str) -> str:
        """HASH: adapter id -> small WebP picture in base64."""
        return f"{self._prefix}adapter-previews:{owner}"

    def _names(self, owner: str) -> str:
        """HASH: name in one case -> adapter id."""
        return f"{self._prefix}adapter-names:{owner}"

    @property
    def _owners(self) -> str:
        """SET of everybody who has, or had, an adapter."""
        return f"{self._prefix}adapter-owners"

    def _held(self, digest: str) -> str:
        """ZSET of holds on a file by when they end."""
        return f"{self._prefix}adapter-held:{digest}"

    def _doomed(self, digest: str) -> str:
        """STRING: the file is being removed right now."""
        return f"{self._prefix}adapter-doomed:{digest}"
