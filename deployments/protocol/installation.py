"""What an installation sets for all its processes on every node: access to weights, and the device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from deployments.protocol.signing_identity import SigningIdentity


@dataclass(frozen=True, slots=True)
class S3Access:
    """How a bucket is reached. What is not set is left to the machine: its role, its own configuration."""

    key: SecretStr | None = None
    secret: SecretStr | None = None
    endpoint_url: str = ""  # of an S3-compatible storage
    region: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of fsspec for s3://. They hold the secret as text."""
        return {
            "key": None if self.key is None else self.key.get_secret_value(),
            "secret": None if self.secret is None else self.secret.get_secret_value(),
            "endpoint_url": self.endpoint_url or None,
            "client_kwargs": {"region_name": self.region} if self.region else {},
            # S3-compatible storages do not accept checksums in trailers, which newer clients send
            "config_kwargs": {
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
                "signature_version": "s3v4",
                "retries": {"total_max_attempts": 2},  # the caller repeats the whole work
            },
        }


@dataclass(frozen=True, slots=True)
class Installation:
    """Settings that replicas need. They travel as an argument: nodes may have other environments."""

    device: str | None = None  # as torch names it; None: the best that there is
    hub_token: SecretStr | None = None  # None: that of the node
    s3: S3Access = S3Access()
    model_cache: Path | None = None  # folder of a node for downloaded weights; None: as the node says
    hip_alloc_conf: str = ""  # of torch's allocator on AMD GPUs
    logical_gpus: bool = False  # GPUs that Ray counts need not be there
    signing: SigningIdentity | None = None  # who signs finished files; None: they are not signed
    metadata_url: str = ""  # of the cloud's service for its nodes; empty: it is not asked


AS_THE_NODE_SAYS = Installation()
