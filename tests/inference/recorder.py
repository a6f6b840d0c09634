"""A real video encoder that keeps the frames it was given."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from deployments.encoder import VideoEncoder
from deployments.media.video_spec import Frames, Segment, Sound, VideoFiles, VideoSpec


class Recorder:
    """An encoder that records its frames, and that a test can let wait (`gate`) or fail (`failure`)."""

    def __init__(self) -> None:
        self._encoder = VideoEncoder()
        self.frames: dict[float, list[Frames]] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = self.cancelled = 0
        self.failure: Exception | None = None

    async def segment(self, spec: VideoSpec, index: int, *chunks: Frames) -> Segment:
        self.asked += 1
        if self.failure is not None:
            raise self.failure
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.frames.setdefault(spec.fps, []).extend(chunks)
        return await self._encoder.segment(spec, index, *chunks)

    async def join(
        self, spec: VideoSpec, segments: Sequence[Segment], sound: Sound | None = None
    ) -> VideoFiles:
        return await self._encoder.join(spec, segments, sound)

    def frames_of(self, fps: int) -> Frames:
        """The frames of the only video with this many frames per second."""
        return np.concatenate(self.frames[fps])
