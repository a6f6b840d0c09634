"""The users of an installation in Valkey: name, e-mail address, role, quota."""

from __future__ import annotations

import hashlib
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from deployments.protocol.errors import BadRequest, Conflict, NotFound
from serve_app.admission.principals import Role
from serve_app.redis.transactions import begin, clock_s, redis_errors, transact

EMAIL = re.compile(r"[^@\s\x00-\x1f]{1,64}@[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*")
NAME_MAX_CHARS = 100
ID_BYTES = 8


@dataclass(frozen=True, slots=True)
class User:
    """A user as last stored."""

    id: str  # 16 hex digits: the owner of their jobs
    name: str
    email: str  # lower case
    role: Role
    images_per_day: int | None  # None: no limit
    budget_per_month: float | None  # in the operator's currency; None: no limit
    disabled: bool
    epoch: int  # a token of another epoch is invalid
    created_at: float  # unix seconds of the store's clock


class Users:
    """Adds, finds, disables and enables users. Raises StoreUnreachable when Valkey does not answer."""

    def __init__(self, redis: Redis, prefix: str) -> None:
        self._redis = redis  # made by transaction.connect
        self._prefix = prefix

    async def add(
        self,
        name: str,
        email: str,
        role: Role = Role.user,
        images_per_day: int | None = None,
        budget_per_month: float | None = None,
    ) -> User:
        """The new user. Raises Conflict when the e-mail address is in use, BadRequest for invalid values."""
        email, name = _checked_email(email), _checked_name(name)
        if images_per_day is not None and images_per_day < 0:
            raise BadRequest(
                "images_per_day must be 0 or more; leave it out for no limit", param="images_per_day"
            )
        if budget_per_month is not None and not 0 <= budget_per_month < math.inf:
            raise BadRequest(
                "budget_per_month must be 0 or more; leave it out for no limit", param="budget_per_month"
            )
        user_id, taken = secrets.token_hex(ID_BYTES), self._email(email)

        async def decide(pipe: Pipeline) -> User:
            known = await pipe.get(taken)
            if known not in (None, user_id):
                raise Conflict(f"there is a user with the e-mail {email}", param="email")
            created_s = await clock_s(pipe)
            fields = {
                "name": name,
                "email": email,
                "role": role.value,
                "images_per_day": "" if images_per_day is None else str(images_per_day),
                "budget_per_month": "" if budget_per_month is None else repr(float(budget_per_month)),
                "disabled": "0",
                "epoch": "0",
                "created": str(created_s),
            }
            begin(pipe)
            pipe.set(taken, user_id)
            pipe.hset(self.key(user_id), mapping=dict(fields.items()))
            pipe.sadd(self._all, user_id)
            return _user(user_id, fields)

        return await transact(self._redis, [taken], decide)

    async def get(self, user_id: str) -> User:
        """Raises NotFound."""
        with redis_errors():
            fields = cast(dict[str, str], await self._redis.hgetall(self.key(user_id)))
        return _known(user_id, fields)

    async def find(self, id_or_email: str) -> User:
        """Raises NotFound."""
        if "@" not in id_or_email:
            return await self.get(id_or_email)
        with redis_errors():
            user_id = cast("str | None", await self._redis.get(self._email(id_or_email.strip().lower())))
        return await self.get(user_id or "")

    async def list(self) -> list[User]:
        """All users, the oldest first."""
        with redis_errors():
            ids = cast(set[str], await self._redis.smembers(self._all))
            async with self._redis.pipeline(transaction=False) as pipe:
                for user_id in ids:
                    pipe.hgetall(self.key(user_id))
                found = await pipe.execute()
        users = [_user(user_id, fields) for user_id, fields in zip(ids, found, strict=True) if fields]
        return sorted(users, key=lambda user: (user.created_at, user.id))

    async def set_disabled(self, user_id: str, disabled: bool) -> User:
        """Disable or enable a user; both invalidate all their tokens. Raises NotFound."""

        async def decide(pipe: Pipeline) -> User:
            fields = dict(cast(dict[str, str], await pipe.hgetall(self.key(user_id))))
            user = _known(user_id, fields)
            fields |= {"disabled": str(int(disabled)), "epoch": str(user.epoch + 1)}
            begin(pipe)
            pipe.hset(self.key(user_id), mapping=dict(fields.items()))
            return _user(user_id, fields)

        return await transact(self._redis, [self.key(user_id)], decide)

    def key(self, user_id: str) -> str:
        """HASH: a user."""
        return f"{self._prefix}user:{user_id}"

    @property
    def _all(self) -> str:
        """SET of user ids."""
        return f"{self._prefix}users"

    def _email(self, email: str) -> str:
        """STRING: id of the user with this e-mail address, which is hashed as it is the caller's text."""
        return f"{self._prefix}email:{hashlib.sha256(email.encode()).hexdigest()}"


def _checked_name(text: str) -> str:
    name = text.strip()
    if not 1 <= len(name) <= NAME_MAX_CHARS or not name.isprintable():
        raise BadRequest(f"a name has 1 to {NAME_MAX_CHARS} printable characters", param="name")
    return name


def _checked_email(text: str) -> str:
    """The address in lower case."""
    email = text.strip().lower()
    if not EMAIL.fullmatch(email):
        raise BadRequest("that is no e-mail address; write it as name@example.org", param="email")
    return email


def _known(user_id: str, fields: Mapping[str, str]) -> User:
    if not fields:
        raise NotFound("there is no such user; see `weft users list`", param="user")
    return _user(user_id, fields)


def _user(user_id: str, fields: Mapping[str, str]) -> User:
    return User(
        id=user_id,
        name=fields["name"],
        email=fields["email"],
        role=Role.admin if fields["role"] == Role.admin else Role.user,  # an unknown one allows the least
        images_per_day=int(fields["images_per_day"]) if fields["images_per_day"] else None,
        budget_per_month=float(budget) if (budget := fields.get("budget_per_month")) else None,
        disabled=fields["disabled"] == "1",
        epoch=int(fields["epoch"]),
        created_at=float(fields["created"]),
    )
