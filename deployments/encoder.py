"""VideoEncoder: what a CPU replica does that turns frames into video files; app.py makes the deployment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from deployments.telemetry import join_serve_log

if TYPE_CHECKING:
    from deployments.media.footage import Footage, Frames, Segment, VideoFiles

T = TypeVar("T")


class VideoEncoder:
    """Encodes segments and joins them. It keeps nothing between calls, so any replica may take any call."""

    def __init__(self, threads: int = 1, at_once: int = 1) -> None:
        """threads: of one segment's encoding. at_once: segments encoded at the same time."""
        from deployments.media import movie

        join_serve_log()
        self._movie = movie
        self._threads = threads
        self._workers = ThreadPoolExecutor(at_once, thread_name_prefix="encode")

    async def segment(self, footage: Footage, index: int, *chunks: Frames) -> Segment:
        """Segment `index` of the video, from its frames in order."""
        return await self._run(partial(self._movie.encode_segment, footage, index, chunks, self._threads))

    async def join(self, footage: Footage, segments: Sequence[Segment]) -> VideoFiles:
        """The finished video and its stills."""
        return await self._run(partial(self._movie.join, footage, segments))

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)
