"""When two requests are the same: digests for Idempotency-Keys, and keys of the result cache.

A cache key is an HMAC under the installation's secret of everything a picture depends on: the owner, the
request as it will run, the content of the model's files and the version of the code. Nobody can compute
another's key, and a header or an id that a caller chooses is no part of it.
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

# what changes how or when a picture is made, and not the picture
EXCLUDED_FIELDS: dict[str, IncEx | bool] = {
    "priority": True,
    "deadline_s": True,
    "output": {"previews": True},
}
CODE = f"weft {__version__}, diffusers {version('diffusers')}, torch {version('torch')}"


def body_digest(body: BaseModel, **also: str | None) -> str:
    """SHA-256 of what a caller sent; its pictures count by their content."""
    return hashlib.sha256(_canonical({"body": body.model_dump(), "also": also})).hexdigest()


def compute_cache_key(
    secret: bytes, owner: str, epoch: int, request: ResolvedRequest, models: Mapping[str, str]
) -> str:
    """Equal for requests of one owner that give the same pictures, until the owner empties the cache.

    request: with its pictures.  models: content digests of everything the card names, by use.
    """
    canonical = {
        "owner": owner,
        "epoch": epoch,
        "request": request.model_dump(exclude=EXCLUDED_FIELDS),
        "models": dict(models),
        "code": CODE,
    }
    return hmac.new(secret, _canonical(canonical), hashlib.sha256).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_digest_of_bytes).encode()


def _digest_of_bytes(value: object) -> str:
    assert isinstance(value, bytes), f"{type(value).__name__} in a request"
    return "sha256:" + hashlib.sha256(value).hexdigest()
