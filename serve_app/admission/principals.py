"""Principals: the caller of a request with role and scopes, and the installation's own key."""

from __future__ import annotations

import base64
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


KEY_SCHEMES = ("bearer", "key", "token")  # of Authorization
KEY_HEADERS = ("x-api-key", "api-key")

SCOPES = frozenset(Scope)
USER_SCOPES = frozenset({Scope.read, Scope.generate})


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller."""

    owner: str  # owner of its jobs: LOCAL, or the id of a user
    role: Role = Role.admin
    scopes: frozenset[Scope] = SCOPES
    images_per_day: int | None = None  # None: no limit
    budget_per_month: float | None = None  # in the operator's currency; None: no limit
    key: str = ""  # prefix of the key; revoking it invalidates what was made from it

    def require(self, scope: Scope) -> None:
        """Raises Forbidden unless this caller has the scope."""
        if scope not in self.scopes:
            raise Forbidden(
                f"this key may not do that: it lacks the scope {scope.value!r}; ask for one with it"
            )


def presented_key(headers: Mapping[str, str]) -> bytes | None:
    """The key as sent in `Authorization: Bearer <key>`, in `X-API-Key: <key>`, or as other services' clients
    send it: `Authorization: Basic` with the key as password (or alone, as user), `Key <key>`, `Token <key>`,
    `api-key: <key>`.

    headers: names in lower case, or a mapping that ignores case; values as HTTP's latin-1 text.
    """
    scheme, _, sent = headers.get("authorization", "").strip().partition(" ")
    key = sent.strip() if scheme.lower() in KEY_SCHEMES else ""
    for header in KEY_HEADERS:
        key = key or headers.get(header, "").strip()
    if not key and scheme.lower() == "basic":  # last: it may be meant for a proxy in between
        key = _password(sent)
    return key.encode("latin-1", "replace") or None


def _password(credentials: str) -> str:
    """Of `user:password` in base64; the user where there is no password; empty for anything else."""
    try:
        text = base64.b64decode(credentials.strip(), validate=True).decode("latin-1")
    except ValueError:
        return ""
    user, _, password = text.partition(":")
    return password.strip() or user.strip()


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
