"""Who is calling: a key held against the installation's one key."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from deployments.protocol.errors import Unauthorized
from serve_app.settings import Settings

LOCAL = "local"  # the owner of everything while an installation has a single key, or none


@dataclass(frozen=True, slots=True)
class Principal:
    """A known caller."""

    owner: str  # whose jobs these are


def presented_key(headers: Mapping[str, str]) -> bytes | None:
    """The key as it was sent, in `Authorization: Bearer <key>` or `X-API-Key: <key>`.

    headers: names in lower case, or a mapping that ignores case; values as HTTP's latin-1 text.
    """
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        key = headers.get("x-api-key", "")
    return key.strip().encode("latin-1", "replace") or None


def identify(key: bytes | None, settings: Settings) -> Principal:
    """The caller who sent this key. Raises Unauthorized when one is demanded and this is not it.

    While the installation has no key, everybody is the same owner and whatever was sent is ignored.
    """
    if settings.api_key is None:
        return Principal(LOCAL)
    if key is None:
        raise Unauthorized(
            "this service needs a key; send it as 'Authorization: Bearer <key>' or 'X-API-Key: <key>'"
        )
    if not hmac.compare_digest(key, settings.api_key.get_secret_value().encode()):
        raise Unauthorized("this key is not known here; check it for missing characters")
    return Principal(LOCAL)
