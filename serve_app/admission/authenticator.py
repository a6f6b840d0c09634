"""Turns the key, token or ticket that a caller sends into a principal."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from dataclasses import dataclass
from typing import TypeAlias

from redis.asyncio import Redis

from deployments.protocol.errors import BadRequest, Conflict, NotFound, Unauthorized
from serve_app.admission import tokens
from serve_app.admission.api_keys import UNKNOWN, ApiKeys, looks_like_key
from serve_app.admission.principals import LOCAL, Principal, Role, Scope, identify
from serve_app.admission.rate_limits import RateLimiter
from serve_app.admission.tickets import REFUSED, TicketHolder, Tickets
from serve_app.admission.users import User, Users
from serve_app.redis.transactions import redis_errors
from serve_app.settings import Settings

logger = logging.getLogger(__name__)

StoreClient: TypeAlias = Redis  # made by transaction.connect


@dataclass(frozen=True, slots=True)
class AccountStore:
    """The stores of accounts, keys, tickets and counts in Valkey."""

    users: Users
    keys: ApiKeys
    limits: RateLimiter
    tickets: Tickets
    redis: Redis

    @classmethod
    def of(cls, redis: Redis, settings: Settings) -> AccountStore:
        prefix = settings.redis_prefix
        return cls(
            Users(redis, prefix),
            ApiKeys(redis, prefix),
            RateLimiter(redis, settings),
            Tickets(redis, prefix),
            redis,
        )


class Authenticator:
    """Knows the installation's own key and, with an account store, the keys and tokens of its users."""

    def __init__(self, settings: Settings, redis: Redis | None) -> None:
        self._settings = settings
        self._accounts = None if redis is None else AccountStore.of(redis, settings)

    @property
    def accounts(self) -> AccountStore | None:
        """None: only the installation's own key exists."""
        return self._accounts

    @property
    def limits(self) -> RateLimiter | None:
        """None while no key is required: a single user on their own machine is not limited."""
        return None if self._accounts is None or self._settings.auth_disabled else self._accounts.limits

    async def identify(self, presented: bytes | None) -> Principal:
        """The caller with this key or token. Raises Unauthorized."""
        text = "" if presented is None else presented.decode("latin-1")
        if self._settings.auth_disabled or self._accounts is None:
            return self._own(presented)
        if looks_like_key(text):
            return await self._by_key(text, self._accounts)
        if tokens.looks_like_token(text):
            return await self._by_token(text, self._accounts)
        return self._own(presented)

    async def log_in(
        self, presented: bytes | None, email: str | None, *, session: bool
    ) -> tuple[str, tokens.Claims]:
        """A token for the caller with this key, valid for a day. A token cannot be exchanged for a new one.

        session: for the cookie of a browser, which never carries the admin scope.
        Raises Unauthorized, Conflict while no key is required, BadRequest without a secret to sign with.
        """
        if self._settings.auth_disabled:
            raise Conflict("this service has no key: every caller on this machine may use it without a token")
        secret = self._secret()
        if presented is not None and tokens.looks_like_token(presented.decode("latin-1")):
            raise Unauthorized("a token cannot be exchanged for another; send the API key")
        principal = await self.identify(presented)
        user = await self._user(principal)
        if email is not None and (user is None or user.email != email.strip().lower()):
            raise Unauthorized(UNKNOWN)
        scopes = principal.scopes - {Scope.admin} if session else principal.scopes
        token, claims = tokens.sign(
            principal.owner,
            principal.key,
            scopes,
            0 if user is None else user.epoch,
            secret,
            int(time.time()),
        )
        logger.info("logged in", extra={"owner": principal.owner, "session": session})
        return token, claims

    async def log_out(self, presented: bytes | None) -> None:
        """Invalidate the token. Raises Conflict for a key."""
        text = "" if presented is None else presented.decode("latin-1")
        if self._accounts is None or not tokens.looks_like_token(text):
            raise Conflict("only a token can be logged out; keys are revoked with `weft keys revoke`")
        claims = tokens.verify(text, self._secret())
        left_s = max(1, claims.expires_at - int(time.time()) + 2 * tokens.CLOCK_SKEW_S)
        with redis_errors():
            await self._accounts.redis.set(self._revoked(claims.jti), "1", ex=left_s)

    async def ticket(self, principal: Principal) -> str:
        """A ticket that opens one socket for this caller, once, within tickets.TTL_S.

        Raises Conflict, Forbidden.
        """
        if self._accounts is None:
            raise Conflict("this service issues no tickets; connect it to its store, or send the key")
        principal.require(Scope.read)
        return await self._accounts.tickets.issue(TicketHolder(principal.owner, principal.key))

    async def redeem(self, ticket: str) -> Principal:
        """The caller that this ticket was issued to, with the read scope only. Raises Unauthorized."""
        if self._settings.auth_disabled or self._accounts is None:
            return self._own(None)
        holder = await self._accounts.tickets.take(ticket)
        allowed = frozenset({Scope.read})
        if holder.owner == LOCAL:
            if not hmac.compare_digest(holder.key, self._own_fingerprint()):
                raise Unauthorized(REFUSED)
            return Principal(LOCAL, Role.admin, allowed, key=holder.key)
        key = await self._accounts.keys.still_valid(holder.key)
        return _principal(await _enabled(self._accounts, holder.owner), allowed & key.scopes, key.prefix)

    def _own(self, presented: bytes | None) -> Principal:
        principal = identify(presented, self._settings)
        return Principal(principal.owner, key=self._own_fingerprint())

    async def _by_key(self, text: str, accounts: AccountStore) -> Principal:
        key = await accounts.keys.check(text)
        return _principal(await _enabled(accounts, key.user_id), key.scopes, key.prefix)

    async def _by_token(self, text: str, accounts: AccountStore) -> Principal:
        claims = tokens.verify(text, self._secret())
        with redis_errors():
            if await accounts.redis.exists(self._revoked(claims.jti)):
                raise Unauthorized(tokens.REFUSED)
        if claims.owner == LOCAL:
            if not hmac.compare_digest(claims.key, self._own_fingerprint()):
                raise Unauthorized(tokens.REFUSED)
            return Principal(LOCAL, Role.admin, claims.scopes, key=claims.key)
        key = await accounts.keys.still_valid(claims.key)
        user = await _enabled(accounts, claims.owner)
        if key.user_id != user.id or claims.epoch != user.epoch:
            raise Unauthorized(tokens.REFUSED)
        return _principal(user, claims.scopes & key.scopes, key.prefix)

    async def _user(self, principal: Principal) -> User | None:
        if self._accounts is None or principal.owner == LOCAL:
            return None
        return await self._accounts.users.get(principal.owner)

    def _secret(self) -> bytes:
        if self._settings.jwt_secret is None:
            raise BadRequest(
                "this service signs no tokens: set WEFT_JWT_SECRET to 32 random bytes or more on every node"
            )
        return self._settings.jwt_secret.get_secret_value().encode()

    def _own_fingerprint(self) -> str:
        """Binds tokens to the installation's own key: a new key invalidates them all."""
        if self._settings.api_key is None or self._settings.jwt_secret is None:
            return ""
        own = self._settings.api_key.get_secret_value().encode()
        return hmac.new(self._secret(), own, hashlib.sha256).hexdigest()[:32]

    def _revoked(self, jti: str) -> str:
        """STRING: a token that was logged out; expires when the token would have."""
        return f"{self._settings.redis_prefix}revoked:{jti}"


async def _enabled(accounts: AccountStore, user_id: str) -> User:
    try:
        user = await accounts.users.get(user_id)
    except NotFound:
        raise Unauthorized(UNKNOWN) from None
    if user.disabled:
        raise Unauthorized(UNKNOWN)
    return user


def _principal(user: User, scopes: frozenset[Scope], key: str) -> Principal:
    """The role limits the scopes: the keys of a former admin have no admin scope any more."""
    allowed = scopes if user.role is Role.admin else scopes - {Scope.admin}
    return Principal(user.id, user.role, allowed, user.images_per_day, user.budget_per_month, key)
