"""Principals: the caller of a request with role and scopes, and the installation's own key."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from deployments.protocol.errors import Forbidden, Unauthorized
from serve_app.settings import Settings

LOCAL = "local"  # owner of all work under the installation's own key, and of all work without a key


class Role(StrEnum):
    """What a user is."""

    user = "user"
    admin = "admin"


class Scope(StrEnum):
    """What a key allows."""

    read = "read"  # read one's own jobs and images, and the models
    generate = "generate"  # submit, cancel and delete one's own jobs
    metrics = "metrics"  # read the service's counters
    admin = "admin"  # manage users and keys; for admins only


SCOPES = frozenset(Scope)
USER_SCOPES = frozenset({Scope.read, Scope.generate})


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller."""

    owner: str  # owner of its jobs: LOCAL, or the id of a user
    role: Role = Role.admin
    scopes: frozenset[Scope] = SCOPES
    images_per_day: int | None = None  # None: no limit
    key: str = ""  # prefix of the key; revoking it invalidates what was made from it

    def require(self, scope: Scope) -> None:
        """Raises Forbidden unless this caller has the scope."""
        if scope not in self.scopes:
            raise Forbidden(
                f"this key may not do that: it lacks the scope {scope.value!r}; ask for one with it"
            )


def presented_key(headers: Mapping[str, str]) -> bytes | None:
    """The key as sent in `Authorization: Bearer <key>` or `X-API-Key: <key>`.

    headers: names in lower case, or a mapping that ignores case; values as HTTP's latin-1 text.
    """
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        key = headers.get("x-api-key", "")
    return key.strip().encode("latin-1", "replace") or None


def identify(key: bytes | None, settings: Settings) -> Principal:
    """The caller with the installation's own key. Raises Unauthorized for any other key.

    While the installation has no key, every caller is the same owner, and a key that is sent is ignored.
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
