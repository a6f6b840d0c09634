"""Tokens: credentials for a day, signed by this installation (JWT with HS256 only)."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import jwt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deployments.protocol.errors import Unauthorized
from serve_app.admission.principals import Scope

ALGORITHM = "HS256"
ISSUER = AUDIENCE = "weft"
TTL_S = 24 * 3600
CLOCK_SKEW_S = 10
MAX_CHARS = 2048
REFUSED = "this token is not valid, or has expired; log in again (POST /auth/token)"


@dataclass(frozen=True, slots=True)
class Claims:
    """The content of a token. Whether it is still valid also depends on the account store."""

    owner: str
    key: str  # prefix of the key it was made from; revoking that invalidates it
    scopes: frozenset[Scope]  # those of the key, or fewer
    epoch: int  # of the user at that time
    jti: str
    issued_at: int  # unix seconds
    expires_at: int


class _Payload(BaseModel):
    """The claims as they are signed; of any other type or form they are refused."""

    model_config = ConfigDict(strict=True)

    sub: str = Field(pattern=r"^[0-9a-z]{1,32}$")
    key: str = Field(pattern=r"^[0-9a-f]{0,32}$")
    scope: str
    epoch: int = Field(ge=0)
    jti: str = Field(pattern=r"^[0-9a-f]{32}$")
    iat: int
    exp: int


def sign(
    owner: str, key: str, scopes: frozenset[Scope], epoch: int, secret: bytes, now: int
) -> tuple[str, Claims]:
    """A token that is valid for a day, and its content."""
    claims = Claims(owner, key, scopes, epoch, secrets.token_hex(16), now, now + TTL_S)
    payload = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": claims.owner,
        "iat": claims.issued_at,
        "exp": claims.expires_at,
        "jti": claims.jti,
        "scope": " ".join(sorted(claims.scopes)),
        "key": claims.key,
        "epoch": claims.epoch,
    }
    return jwt.encode(payload, secret, algorithm=ALGORITHM), claims


def verify(token: str, secret: bytes) -> Claims:
    """The content of a token of ours. Raises Unauthorized, with the same text for every cause."""
    if len(token) > MAX_CHARS:
        raise Unauthorized(REFUSED)
    try:
        payload = _Payload.model_validate(_decoded(token, secret))
        scopes = frozenset(Scope(scope) for scope in payload.scope.split())
    except (jwt.PyJWTError, ValidationError, TypeError, ValueError, OverflowError, RecursionError):
        # PyJWT lets the last four through: lists where it expects text, infinity as a time, deep nesting
        raise Unauthorized(REFUSED) from None
    return Claims(payload.sub, payload.key, scopes, payload.epoch, payload.jti, payload.iat, payload.exp)


def _decoded(token: str, secret: bytes) -> object:
    return jwt.decode(
        token,
        secret,
        algorithms=[ALGORITHM],
        audience=AUDIENCE,
        issuer=ISSUER,
        leeway=CLOCK_SKEW_S,
        # by default PyJWT accepts tokens without an expiry, and keys of three bytes
        options={
            "require": ["exp", "iat", "sub", "jti", "aud", "iss"],
            "enforce_minimum_key_length": True,
        },
    )


def looks_like_token(text: str) -> bool:
    """Whether the text has the form of a JWT; it need not be valid."""
    return text.count(".") == 2 and text.startswith("ey")
