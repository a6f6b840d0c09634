"""Where a replica gets an adapter's file from that it does not have."""

from __future__ import annotations

from typing import Protocol


class LoraFileReader(Protocol):
    """The files of all registered adapters, by digest. In the graph: a handle to the front floor."""

    async def read(self, digest: str) -> bytes:
        """The safetensors file with this SHA-256 (hex). Raises NotFound when there is none."""
        ...
