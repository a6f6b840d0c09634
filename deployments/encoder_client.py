"""Calls to the VideoEncoder deployment from a model's replica."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import ray.exceptions
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.media.video_spec import Frames, Segment, Sound, VideoFiles, VideoSpec
from deployments.protocol.errors import Internal, ModelUnavailable, WeftError
from deployments.protocol.log_context import current

TRIES = 4  # of one call, when encoders are lost
RETRY_FIRST_S = 0.25

logger = logging.getLogger(__name__)


class RemoteEncoder:
    """An Encoder behind a handle. Frames travel through Ray's object store; a call whose replica is lost is
    repeated with the frames that are still held here."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def segment(self, spec: VideoSpec, index: int, *chunks: Frames) -> Segment:
        segment: Segment = await self._call("segment", spec, index, *chunks)
        return segment

    async def join(
        self, spec: VideoSpec, segments: Sequence[Segment], sound: Sound | None = None
    ) -> VideoFiles:
        files: VideoFiles = await self._call("join", spec, list(segments), sound)
        return files

    async def _call(self, method: str, *arguments: Any) -> Any:
        """Raises the encoder's WeftError, Internal for other errors of its, ModelUnavailable when its
        replicas are lost TRIES times in a row."""
        for attempt in range(TRIES):
            response = getattr(self._handle, method).remote(*arguments, log_context=current())
            try:
                return await response
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, WeftError):
                    raise error.cause from None
                raise Internal(f"the video encoder failed: {error.cause!r}") from error
            except (ray.exceptions.RayError, RayServeException) as error:
                logger.warning("video encoder lost", extra={"error": repr(error), "attempt": attempt})
                await asyncio.sleep(RETRY_FIRST_S * 2**attempt)
            except asyncio.CancelledError:
                response.cancel()  # cancelling the await does not reach the replica
                raise
        raise ModelUnavailable(f"the video encoder was lost {TRIES} times in a row; try again")
