"""Tickets: credentials in the URL of a WebSocket, valid once and for half a minute.

A browser cannot set headers on a WebSocket, so its credential is part of the URL, which logs and histories
keep. A ticket is worthless there, because its first use invalidates it.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass

from pydantic import TypeAdapter
from redis.asyncio import Redis

from deployments.protocol.errors import Unauthorized
from serve_app.redis.transactions import redis_errors

TTL_S = 30
TICKET = re.compile(r"[A-Za-z0-9_-]{43}")
REFUSED = "this ticket is not valid, or was used before; request another one (POST /auth/ticket)"


@dataclass(frozen=True, slots=True)
class TicketHolder:
    """The caller that a ticket was issued to."""

    owner: str
    key: str  # prefix of the caller's key; revoking it invalidates the ticket


TICKET_HOLDER = TypeAdapter(TicketHolder)


class Tickets:
    """Issues tickets and redeems each once, on any replica."""

    def __init__(self, redis: Redis, prefix: str) -> None:
        self._redis = redis  # made by transaction.connect
        self._prefix = prefix

    async def issue(self, holder: TicketHolder) -> str:
        """A new ticket: 43 characters, 256 random bits."""
        ticket = secrets.token_urlsafe(32)
        with redis_errors():
            await self._redis.set(self._key(ticket), TICKET_HOLDER.dump_json(holder).decode(), ex=TTL_S)
        return ticket

    async def take(self, ticket: str) -> TicketHolder:
        """Invalidate a ticket and return its holder. Raises Unauthorized."""
        if not TICKET.fullmatch(ticket):
            raise Unauthorized(REFUSED)
        with redis_errors():
            found = await self._redis.getdel(self._key(ticket))
        if found is None:
            raise Unauthorized(REFUSED)
        return TICKET_HOLDER.validate_json(found)

    def _key(self, ticket: str) -> str:
        """STRING: the holder of a ticket; the ticket itself is not stored."""
        return f"{self._prefix}ticket:{hashlib.sha256(ticket.encode()).hexdigest()}"
