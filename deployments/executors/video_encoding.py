"""One video on its way through an encoder: frames in as they are decoded, files out at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self

from deployments.media.video_spec import SEGMENT_FRAMES, Frames, Segment, Sound, VideoFiles, VideoSpec

SEGMENTS_IN_FLIGHT = 2  # encoded or on the way; further frames wait in `add`


class Encoder(Protocol):
    """A VideoEncoder, here or behind a handle."""

    async def segment(self, spec: VideoSpec, index: int, *chunks: Frames) -> Segment:
        """See VideoEncoder."""
        ...

    async def join(
        self, spec: VideoSpec, segments: Sequence[Segment], sound: Sound | None = None
    ) -> VideoFiles:
        """See VideoEncoder."""
        ...


class EncodingSession:
    """Cuts frames into segments and has them encoded while the next are decoded.

    Holds the frames of at most SEGMENTS_IN_FLIGHT + 1 segments. Leaving the block early cancels all calls.
    """

    def __init__(self, encoder: Encoder, spec: VideoSpec) -> None:
        self.spec = spec
        self._encoder = encoder
        self._chunks: list[Frames] = []  # of the segment that is not full yet
        self._in_flight: set[asyncio.Task[Segment]] = set()
        self._segments: list[Segment] = []
        self.sound: Sound | None = None  # of the finished file

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
        """Number of encoded frames."""
        return sum(segment.frames for segment in self._segments)

    async def add(self, frames: Frames) -> None:
        """Take the next frames (n, H, W, 3). Waits while SEGMENTS_IN_FLIGHT segments are being encoded."""
        while len(frames):
            missing = SEGMENT_FRAMES - sum(len(chunk) for chunk in self._chunks)
            self._chunks.append(frames[:missing])
            frames = frames[missing:]
            if sum(len(chunk) for chunk in self._chunks) == SEGMENT_FRAMES:
                await self._send()

    async def wait_for_segment(self) -> bool:
        """Send the frames that are left, then wait until a segment is encoded; False when all are."""
        if self._chunks:
            await self._send()
        if not self._in_flight:
            return False
        await self._collect()
        return True

    async def files(self, comment: str = "", description: str = "") -> VideoFiles:
        """The finished files, when all frames were added; both texts are written into the container."""
        while await self.wait_for_segment():
            pass
        spec = replace(self.spec, comment=comment, description=description)
        return await self._encoder.join(spec, sorted(self._segments, key=lambda s: s.index), self.sound)

    async def _send(self) -> None:
        while len(self._in_flight) >= SEGMENTS_IN_FLIGHT:
            await self._collect()
        index = len(self._segments) + len(self._in_flight)
        chunks, self._chunks = self._chunks, []
        self._in_flight.add(asyncio.create_task(self._encoder.segment(self.spec, index, *chunks)))

    async def _collect(self) -> None:
        """Wait for one segment. Raises what its encoding raised."""
        done, _ = await asyncio.wait(self._in_flight, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            self._in_flight.discard(task)
            self._segments.append(task.result())
