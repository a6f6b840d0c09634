"""The events of a running request in order; the last one is Done or Failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import ConfigDict

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.errors import KINDS, Internal, WeftError


@dataclass(frozen=True, slots=True)
class Queued:
    """Accepted by a replica, waiting for a slot."""

    ahead: int  # requests before this one on the same replica
    starts_in_s: float | None = None  # estimates; None before the replica has measured its first requests
    finishes_in_s: float | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """The pipeline call has begun."""

    steps: int  # denoising steps it plans to run; Step.steps is exact


@dataclass(frozen=True, slots=True)
class Step:
    """One denoising step has ended."""

    step: int  # 1..steps
    steps: int
    # device seconds of this call so far; on a GPU those of the last one or two forwards are not in it
    device_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Stage:
    """Progress of a video after its last denoising step, in frames."""

    name: Literal["decode", "encode"]
    done: int  # 0..total
    total: int


@dataclass(frozen=True, slots=True)
class Preview:
    """A rough picture of the unfinished latents."""

    __pydantic_config__ = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    step: int
    media_type: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Artifact:
    """One finished file."""

    index: int  # 0..num_images-1
    kind: str  # image, thumbnail, video, poster or spritesheet; all carry the index of their picture
    media_type: str
    data: bytes
    width: int  # pixels
    height: int
    seed: int  # of this picture: request.seed + index
    metadata: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Done:
    """All artifacts have been sent."""

    queued_s: float
    generation_s: float  # from Started to the last artifact
    # modules whose forwards this request shared with others in batch sizes not proven to be exact, sorted;
    # only of a request that preferred exactness
    merged_unproven: tuple[str, ...] = ()
    # found while the request ran, or by a replica that a call by handle reached without validation
    warnings: tuple[Adjustment, ...] = ()
    # its share, by rows, of the seconds of every forward, and what decoding its video took
    device_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Handover:
    """The replica is shutting down and the request did not cause it. Failed follows.

    Pass `state` to `generate(..., resume=state)` with the same request on another replica. Empty: the request
    starts from its first step there.
    """

    step: int  # steps done
    state: bytes


@dataclass(frozen=True, slots=True)
class CheckpointPolicy:
    """How often a caller wants the state of a request that runs, and how large it may be."""

    interval_s: float
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state of a request that goes on running, for callers that ask for it.

    If its replica is lost, pass `state` to `generate(..., resume=state)` with the same request on another.
    """

    step: int  # steps done
    state: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended without its artifacts."""

    kind: str
    message: str
    retryable: bool
    param: str | None = None
    retry_after_s: float | None = None
    device_s: float = field(default=0.0, compare=False)  # as in Done

    @staticmethod
    def of(error: WeftError) -> Failed:
        return Failed(error.kind, error.message, error.retryable, error.param, error.retry_after_s)

    def to_error(self) -> WeftError:
        """The error of this event, to be raised on the caller's side."""
        kind = KINDS.get(self.kind, Internal)
        return kind(self.message, param=self.param, retry_after_s=self.retry_after_s)


Event = Queued | Started | Step | Stage | Preview | Artifact | Checkpoint | Handover | Done | Failed
