"""What a running request tells its caller: small facts in order, the last one Done or Failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deployments.protocol.errors import KINDS, Internal, WeftError


@dataclass(frozen=True, slots=True)
class Queued:
    """Accepted by a replica, waiting for a slot."""

    ahead: int  # requests before this one on the same replica


@dataclass(frozen=True, slots=True)
class Started:
    """The pipeline call has begun."""

    steps: int  # denoising steps it plans to run; Step.steps is exact


@dataclass(frozen=True, slots=True)
class Step:
    """One denoising step is done."""

    step: int  # 1..steps
    steps: int


@dataclass(frozen=True, slots=True)
class Preview:
    """A rough look at the unfinished picture."""

    step: int
    media_type: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Artifact:
    """One finished file."""

    index: int  # 0..num_images-1
    kind: str  # "image" or "thumbnail"; both carry the index of their picture
    media_type: str
    data: bytes
    width: int  # pixels
    height: int
    seed: int  # of this very picture: request.seed + index
    metadata: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Done:
    """Everything was delivered."""

    queued_s: float
    generation_s: float  # from Started to the last artifact


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended without its artifacts."""

    kind: str
    message: str
    retryable: bool
    param: str | None = None

    @staticmethod
    def of(error: WeftError) -> Failed:
        return Failed(error.kind, error.message, error.retryable, error.param)

    def to_error(self) -> WeftError:
        """The error this event stands for, ready to be raised on the caller's side."""
        return KINDS.get(self.kind, Internal)(self.message, param=self.param)


Event = Queued | Started | Step | Preview | Artifact | Done | Failed
