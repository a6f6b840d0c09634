"""Signatures of links that open one finished file without a key, until their time is up (pure).

As presigned addresses of S3 are: who has the address has the file; changing any part of it spoils it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac


def signature(secret: bytes, job_id: str, index: int, kind: str, expires_at: int) -> str:
    """43 characters that only this installation can compute. expires_at: unix seconds."""
    signed_text = f"link:{job_id}:{index}:{kind}:{expires_at}".encode()
    mac = hmac.new(secret, signed_text, hashlib.sha256).digest()
    return base64.urlsafe_b64encode(mac).decode().rstrip("=")


def is_valid(
    secret: bytes, job_id: str, index: int, kind: str, expires_at: int, given: str, now: float
) -> bool:
    """Whether this link is one of ours, and its time is not up."""
    ours = signature(secret, job_id, index, kind, expires_at)
    return hmac.compare_digest(ours.encode(), given.encode("utf-8", "replace")) and now < expires_at
