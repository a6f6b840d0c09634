"""Where a replica reads the LoRA files from that it does not have."""

from __future__ import annotations

import hashlib
from typing import Protocol

from deployments.protocol.errors import BadRequest


class LoraFileReader(Protocol):
    """The files of all registered LoRAs by digest. In a Serve application: a handle to the serving layer."""

    async def read(self, digest: str) -> bytes:
        """The safetensors file with this SHA-256 (64 hex digits). Raises NotFound where there is none."""
        ...


def check_digest(file: bytes, digest: str) -> None:
    """Raises BadRequest unless digest is the file's SHA-256 (64 hex digits)."""
    if hashlib.sha256(file).hexdigest() != digest:
        raise BadRequest(f"the LoRA's SHA-256 is not {digest}; upload it again", param="loras")
