"""Tokens: a principal's word for a day, signed by this installation (JWT, HS256 and nothing else)."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import jwt

from deployments.protocol.errors import Unauthorized

ALGORITHM = "HS256"
ISSUER = AUDIENCE = "weft"
TTL_S = 24 * 3600
MIN_SECRET_BYTES = 32  # a shorter HMAC key can be guessed from one token
CLOCK_SKEW_S = 10
MAX_CHARS = 2048
REFUSED = "this token is not valid, or no longer; log in anew (POST /auth/token)"


@dataclass(frozen=True, slots=True)
class Claims:
    """What a token says. Whether it still holds, the books say."""

    owner: str
    key: str  # which key it was made from; it ends with that
    scopes: str  # of that key, or fewer; separated by blanks
    epoch: int  # of the user when it was made
    jti: str
    issued_at: int  # unix seconds
    expires_at: int


def sign(owner: str, key: str, scopes: str, epoch: int, secret: bytes, now: int) -> tuple[str, Claims]:
    """A token for a day, and what it says."""
    claims = Claims(owner, key, scopes, epoch, secrets.token_hex(16), now, now + TTL_S)
    payload = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": claims.owner,
        "iat": claims.issued_at,
        "exp": claims.expires_at,
        "jti": claims.jti,
        "scope": claims.scopes,
        "key": claims.key,
        "epoch": claims.epoch,
    }
    return jwt.encode(payload, secret, algorithm=ALGORITHM), claims


def verify(token: str, secret: bytes) -> Claims:
    """What a token of ours says. Raises Unauthorized for any other, in the same words."""
    if len(token) > MAX_CHARS:
        raise Unauthorized(REFUSED)
    try:
        payload = jwt.decode(
            token,
            secret,
            algorithms=[ALGORITHM],
            audience=AUDIENCE,
            issuer=ISSUER,
            leeway=CLOCK_SKEW_S,
            # PyJWT by itself takes a token that never ends, and keys of three bytes
            options={
                "require": ["exp", "iat", "sub", "jti", "aud", "iss"],
                "enforce_minimum_key_length": True,
            },
        )
        return Claims(
            owner=str(payload["sub"]),
            key=str(payload["key"]),
            scopes=str(payload["scope"]),
            epoch=int(payload["epoch"]),
            jti=str(payload["jti"]),
            issued_at=int(payload["iat"]),
            expires_at=int(payload["exp"]),
        )
    except (jwt.PyJWTError, KeyError, TypeError, ValueError):
        raise Unauthorized(REFUSED) from None


def looks_like_token(text: str) -> bool:
    """Whether it has the form of a JWT, not whether it is one."""
    return text.count(".") == 2 and text.startswith("ey")
