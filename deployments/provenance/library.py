"""The C2PA library, imported where it is used: not every platform has its native code."""

from __future__ import annotations

from typing import Any

from deployments.protocol.errors import ModelUnavailable

# its types are not stated as PEP 561 wants them
C2PA = Any
C2paContext = Any
C2paSigner = Any


def load_library() -> C2PA:
    """The module `c2pa`. Raises ModelUnavailable where it is not installed or does not run."""
    try:
        import c2pa
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelUnavailable(
            f"files cannot be signed, because c2pa-python does not run here ({error}); install it, or set "
            "WEFT_CONTENT_CREDENTIALS=false to serve files without content credentials"
        ) from error
    return c2pa
