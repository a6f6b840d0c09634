"""When two requests are equal: digests for Idempotency-Keys, and keys of the result cache (pure).

A cache key is an HMAC under the installation's secret of everything a result depends on: the owner, the
resolved request, the content of the model's files and the version of the code. Nothing that a caller can
choose freely (a header, an id) is part of it, and without the secret no key can be computed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.main import IncEx

from deployments import __version__
from deployments.protocol.request import ResolvedRequest

# fields that change when or how a result is generated, but not the result
EXCLUDED_FIELDS: dict[str, IncEx | bool] = {
    "priority": True,
    "deadline_s": True,
    "output": {"previews": True},
}
CODE_VERSION = f"weft {__version__}, diffusers {version('diffusers')}, torch {version('torch')}"


def body_digest(body: BaseModel, **also: str | None) -> str:
    """SHA-256 of a request body and of `also`; images count by their content.

    A default counts as absent, so that a new field of a later version leaves the digest of an old body.
    """
    given = body.model_dump(exclude_defaults=True)
    return hashlib.sha256(_canonical({"body": given, "also": also})).hexdigest()


def compute_cache_key(
    secret: bytes, owner: str, epoch: int, request: ResolvedRequest, models: Mapping[str, str]
) -> str:
    """Equal for requests of one owner that have equal results, until the owner empties the cache.

    request: with its input images.  models: content digests of all weights the card names, by use.
    """
    parts = {
        "owner": owner,
        "epoch": epoch,
        "request": request.model_dump(exclude=EXCLUDED_FIELDS),
        "models": dict(models),
        "code": CODE_VERSION,
    }
    return hmac.new(secret, _canonical(parts), hashlib.sha256).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_digest_of_bytes).encode()


def _digest_of_bytes(value: object) -> str:
    assert isinstance(value, bytes), f"{type(value).__name__} in a request"
    return "sha256:" + hashlib.sha256(value).hexdigest()
