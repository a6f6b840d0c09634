"""Tickets: a caller's word for one socket, within half a minute.

A browser can set no header on a WebSocket, so what names the caller stands in its address, where logs and
histories keep it. A ticket is worth nothing by then: it is used up by the first who shows it.
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
REFUSED = "this ticket is not valid, or was used before; get another one (POST /auth/ticket)"


@dataclass(frozen=True, slots=True)
class TicketHolder:
    """Whom a ticket stands for."""

    owner: str
    key: str  # the key that vouched for them; the ticket ends with it


TICKET_HOLDER = TypeAdapter(TicketHolder)


class Tickets:
    """Given out once, taken back once, whichever replica is asked."""

    def __init__(self, redis: Redis, prefix: str) -> None:
        self._redis = redis  # made by transaction.connect
        self._prefix = prefix

    async def issue(self, holder: TicketHolder) -> str:
        """A new one: 43 characters, 256 random bits."""
        ticket = secrets.token_urlsafe(32)
        with redis_errors():
            await self._redis.set(self._key(ticket), TICKET_HOLDER.dump_json(holder).decode(), ex=TTL_S)
        return ticket

    async def take(self, ticket: str) -> TicketHolder:
        """Whose it was; nobody can show it again. Raises Unauthorized."""
        if not TICKET.fullmatch(ticket):
            raise Unauthorized(REFUSED)
        with redis_errors():
            found = await self._redis.getdel(self._key(ticket))
        if found is None:
            raise Unauthorized(REFUSED)
        return TICKET_HOLDER.validate_json(found)

    def _key(self, ticket: str) -> str:
        """STRING: its holder; the ticket itself is not kept."""
        return f"{self._prefix}ticket:{hashlib.sha256(ticket.encode()).hexdigest()}"
