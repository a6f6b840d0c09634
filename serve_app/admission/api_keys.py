"""API keys: `wf_<prefix>.<secret>`, shown once, stored as a SHA-256."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from deployments.protocol.errors import BadRequest, NotFound, Unauthorized
from serve_app.admission.principals import SCOPES, Scope
from serve_app.redis.transactions import begin, clock_us, redis_errors, time_us, transact

SECRET_BYTES = 32
FORM = re.compile(r"wf_([0-9a-f]{12})\.([A-Za-z0-9_-]{43})")
NAME_MAX_CHARS = 100
UNKNOWN = "this key is not known here; check it for missing characters, or ask for a new one"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret."""

    prefix: str  # 12 hex digits: its public name
    user_id: str
    name: str  # purpose, as the user wrote it
    scopes: frozenset[Scope]
    created_at: float  # unix seconds of the store's clock, like the next two
    expires_at: float | None
    revoked_at: float | None

    def valid(self, now: float) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


def looks_like_key(text: str) -> bool:
    """Whether the text has the form of a key; the key need not exist."""
    return FORM.fullmatch(text) is not None


def public_name(presented: bytes | None) -> str:
    """What may be said of a key that was sent: its prefix; "other" of a token or the installation's key."""
    match = FORM.fullmatch("" if presented is None else presented.decode("latin-1"))
    return "other" if match is None else match[1]


class ApiKeys:
    """Creates, checks and revokes keys. Raises StoreUnreachable when Valkey does not answer."""

    def __init__(self, redis: Redis, prefix: str) -> None:
        self._redis = redis  # made by transaction.connect
        self._prefix = prefix

    async def create(
        self, user_id: str, scopes: Collection[Scope], *, name: str = "", expires_in_s: float | None = None
    ) -> tuple[ApiKey, str]:
        """The new key and its text, which cannot be recovered later. Raises BadRequest."""
        if not scopes:
            raise BadRequest(f"a key needs scopes, of {', '.join(Scope)}", param="scopes")
        if len(name) > NAME_MAX_CHARS or not (name.isprintable() or not name):
            raise BadRequest(f"a key's name has at most {NAME_MAX_CHARS} printable characters", param="name")
        if expires_in_s is not None and expires_in_s <= 0:
            raise BadRequest(
                "expires_in_s must be above 0; leave it out for a key that does not expire",
                param="expires_in_s",
            )
        prefix, secret = secrets.token_hex(6), secrets.token_urlsafe(SECRET_BYTES)
        hashed = _digest(secret)

        async def decide(pipe: Pipeline) -> ApiKey:
            now = await _now(pipe)
            fields = {
                "user": user_id,
                "sha256": hashed,
                "name": name,
                "scopes": " ".join(sorted(scopes)),
                "created": str(now),
                "expires": "" if expires_in_s is None else str(now + expires_in_s),
                "revoked": "",
            }
            begin(pipe)
            pipe.hset(self._key(prefix), mapping=dict(fields.items()))
            pipe.sadd(self._all, prefix)
            return _api_key(prefix, fields)

        return await transact(self._redis, [self._key(prefix)], decide), f"wf_{prefix}.{secret}"

    async def check(self, text: str) -> ApiKey:
        """The valid key with this text. Raises Unauthorized, with the same text for every cause."""
        match = FORM.fullmatch(text)
        if match is None:
            raise Unauthorized(UNKNOWN)
        prefix, secret = match.groups()
        fields, now = await self._read(prefix)
        # compared even for an unknown prefix: the time of an answer must not reveal which prefixes exist
        right = hmac.compare_digest(fields.get("sha256", ""), _digest(secret))
        if not right or not _api_key(prefix, fields).valid(now):
            raise Unauthorized(UNKNOWN)
        return _api_key(prefix, fields)

    async def still_valid(self, prefix: str) -> ApiKey:
        """The key that a token was made from. Raises Unauthorized when it is revoked or expired."""
        fields, now = await self._read(prefix)
        if not fields or not _api_key(prefix, fields).valid(now):
            raise Unauthorized("the key of this token is no longer valid; log in again")
        return _api_key(prefix, fields)

    async def list(self) -> list[ApiKey]:
        """All keys, the oldest first."""
        with redis_errors():
            prefixes = cast(set[str], await self._redis.smembers(self._all))
            async with self._redis.pipeline(transaction=False) as pipe:
                for prefix in prefixes:
                    pipe.hgetall(self._key(prefix))
                found = await pipe.execute()
        keys = [_api_key(prefix, fields) for prefix, fields in zip(prefixes, found, strict=True) if fields]
        return sorted(keys, key=lambda key: (key.created_at, key.prefix))

    async def revoke(self, prefix: str) -> ApiKey:
        """Invalidate the key and return it. Raises NotFound."""

        async def decide(pipe: Pipeline) -> ApiKey:
            fields = dict(cast(dict[str, str], await pipe.hgetall(self._key(prefix))))
            if not fields:
                raise NotFound("there is no such key; see `weft keys list`", param="prefix")
            fields["revoked"] = fields["revoked"] or str(await _now(pipe))
            begin(pipe)
            pipe.hset(self._key(prefix), "revoked", fields["revoked"])
            return _api_key(prefix, fields)

        return await transact(self._redis, [self._key(prefix)], decide)

    async def _read(self, prefix: str) -> tuple[Mapping[str, str], float]:
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.hgetall(self._key(prefix))
                pipe.time()
                fields, now = await pipe.execute()
        return fields, time_us(now) / 1e6

    def _key(self, prefix: str) -> str:
        """HASH: a key."""
        return f"{self._prefix}key:{prefix}"

    @property
    def _all(self) -> str:
        """SET of prefixes."""
        return f"{self._prefix}api-keys"


def _digest(secret: str) -> str:
    # the secret has 256 random bits: a slow hash would add nothing
    return hashlib.sha256(secret.encode()).hexdigest()


async def _now(pipe: Pipeline) -> float:
    return await clock_us(pipe) / 1e6


def _api_key(prefix: str, fields: Mapping[str, str]) -> ApiKey:
    return ApiKey(
        prefix=prefix,
        user_id=fields["user"],
        name=fields["name"],
        # one that a newer version wrote is not known here and allows nothing
        scopes=frozenset(Scope(scope) for scope in fields["scopes"].split() if scope in SCOPES),
        created_at=float(fields["created"]),
        expires_at=float(fields["expires"]) if fields["expires"] else None,
        revoked_at=float(fields["revoked"]) if fields["revoked"] else None,
    )
