"""One video on its way through an encoder: frames in as they are decoded, files out at the end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, Self

import ray.exceptions
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.media.video_spec import SEGMENT_FRAMES, Frames, Segment, VideoFiles, VideoSpec
from deployments.protocol.errors import Internal, ModelUnavailable, WeftError
from deployments.protocol.log_context import current

SEGMENTS_IN_FLIGHT = 2  # encoded or on the way; more frames than these wait for room
TRIES = 4  # of one call, when encoders are lost
RETRY_FIRST_S = 0.25

logger = logging.getLogger(__name__)


class Encoder(Protocol):
    """A VideoEncoder, here or behind a handle."""

    async def segment(self, spec: VideoSpec, index: int, *chunks: Frames) -> Segment:
        """See VideoEncoder."""
        ...

    async def join(self, spec: VideoSpec, segments: Sequence[Segment]) -> VideoFiles:
        """See VideoEncoder."""
        ...


class RemoteEncoder:
    """The encoder deployment. A call whose replica is lost is made again, with the frames still held here;
    frames travel through Ray's object store."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def segment(self, spec: VideoSpec, index: int, *chunks: Frames) -> Segment:
        segment: Segment = await self._call("segment", spec, index, *chunks)
        return segment

    async def join(self, spec: VideoSpec, segments: Sequence[Segment]) -> VideoFiles:
        files: VideoFiles = await self._call("join", spec, list(segments))
        return files

    async def _call(self, method: str, *arguments: Any) -> Any:
        """Raises ModelUnavailable when the encoder is lost again and again."""
        for attempt in range(TRIES):
            response = getattr(self._handle, method).remote(*arguments, log_context=current())
            try:
                return await response
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, WeftError):
                    raise error.cause from None
                raise Internal(f"the video encoder failed: {error.cause!r}") from error
            except (ray.exceptions.RayError, RayServeException) as error:
                logger.warning("a video encoder was lost", extra={"error": repr(error), "attempt": attempt})
                await asyncio.sleep(RETRY_FIRST_S * 2**attempt)
            except asyncio.CancelledError:
                response.cancel()  # a cancelled await tells the replica nothing
                raise
        raise ModelUnavailable(f"the video encoder was lost {TRIES} times in a row; try again")


class EncodingSession:
    """Cuts frames into segments and has them encoded while the next are decoded.

    It holds the frames of at most SEGMENTS_IN_FLIGHT + 1 segments. Leaving the block early drops all work.
    """

    def __init__(self, encoder: Encoder, spec: VideoSpec) -> None:
        self._encoder = encoder
        self._spec_of = spec
        self._chunks: list[Frames] = []  # of the segment that is not full yet
        self._in_flight: set[asyncio.Task[Segment]] = set()
        self._segments: list[Segment] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._in_flight:
            task.cancel()
        await asyncio.gather(*self._in_flight, return_exceptions=True)

    @property
    def encoded(self) -> int:
        """Frames that are done."""
        return sum(segment.frames for segment in self._segments)

    async def add(self, frames: Frames) -> None:
        """Take the next frames (n, H, W, 3). Waits while too many are on the way."""
        while len(frames):
            room = SEGMENT_FRAMES - sum(len(chunk) for chunk in self._chunks)
            self._chunks.append(frames[:room])
            frames = frames[room:]
            if sum(len(chunk) for chunk in self._chunks) == SEGMENT_FRAMES:
                await self._send()

    async def wait_for_segment(self) -> bool:
        """Send what is left, then wait until a segment is done; False when all are."""
        if self._chunks:
            await self._send()
        if not self._in_flight:
            return False
        await self._settle()
        return True

    async def files(self, comment: str = "", description: str = "") -> VideoFiles:
        """The finished files, when all frames were added; both texts go into the video's container."""
        while await self.wait_for_segment():
            pass
        spec = replace(self._spec_of, comment=comment, description=description)
        return await self._encoder.join(spec, sorted(self._segments, key=lambda s: s.index))

    async def _send(self) -> None:
        while len(self._in_flight) >= SEGMENTS_IN_FLIGHT:
            await self._settle()
        index = len(self._segments) + len(self._in_flight)
        chunks, self._chunks = self._chunks, []
        self._in_flight.add(asyncio.create_task(self._encoder.segment(self._spec_of, index, *chunks)))

    async def _settle(self) -> None:
        """Wait for one segment. Raises what its encoding raised."""
        done, _ = await asyncio.wait(self._in_flight, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            self._in_flight.discard(task)
            self._segments.append(task.result())
