"""Signatures of links that open one finished file without a key until they expire (pure).

They work like presigned S3 URLs: the address alone grants access, and changing any part of it invalidates it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac


def signature(secret: bytes, job_id: str, index: int, kind: str, expires_at: int) -> str:
    """43 URL-safe characters: an HMAC-SHA256 under the installation's secret. expires_at: unix seconds."""
    signed_text = f"link:{job_id}:{index}:{kind}:{expires_at}".encode()
    mac = hmac.new(secret, signed_text, hashlib.sha256).digest()
    return base64.urlsafe_b64encode(mac).decode().rstrip("=")


def is_valid(
    secret: bytes, job_id: str, index: int, kind: str, expires_at: int, given: str, now: float
) -> bool:
    """Whether the given signature is the one of this link and the link has not expired at `now`."""
    expected = signature(secret, job_id, index, kind, expires_at)
    return hmac.compare_digest(expected.encode(), given.encode("utf-8", "replace")) and now < expires_at
