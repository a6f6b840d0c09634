"""VideoEncoder: what a CPU replica does that turns frames into video files; app.py makes the deployment."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from deployments.observability.metrics import Reporter, Sample, join_serve_log
from deployments.protocol.log_context import LogContext, bind

if TYPE_CHECKING:
    from deployments.media.video_spec import Frames, Segment, VideoFiles, VideoSpec

T = TypeVar("T")

logger = logging.getLogger(__name__)


class VideoEncoder:
    """Encodes segments and joins them. It keeps nothing between calls, so any replica may take any call."""

    def __init__(self, threads: int = 1, concurrency: int = 2) -> None:
        """threads: of one segment's encoding.
        at_once: segments encoded at the same time; where one ends, another fills the cores.
        """
        from deployments.media import movie

        join_serve_log()
        self._movie = movie
        self._threads = threads
        self._workers = ThreadPoolExecutor(concurrency, thread_name_prefix="encode")
        self._frames, self._videos, self._busy_s = 0, 0, 0.0
        self._reporter = Reporter()

    async def segment(
        self, spec: VideoSpec, index: int, *chunks: Frames, log_context: LogContext | None = None
    ) -> Segment:
        """Segment `index` of the video, from its frames in order. origin: what log lines tell of it."""
        work = partial(self._movie.encode_segment, spec, index, chunks, self._threads)
        segment = await self._run(work, log_context)
        self._frames += segment.frames
        self._report()
        logger.info("segment encoded", extra={"index": index, "frames": segment.frames})
        return segment

    async def join(
        self, spec: VideoSpec, segments: Sequence[Segment], *, log_context: LogContext | None = None
    ) -> VideoFiles:
        """The finished video and its stills."""
        files = await self._run(partial(self._movie.join, spec, segments), log_context)
        self._videos += 1
        self._report()
        return files

    async def _run(self, work: Callable[[], T], log_context: LogContext | None) -> T:
        if log_context is not None:
            bind(log_context)  # this call has a task, and so a context, of its own
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        return await loop.run_in_executor(self._workers, context.run, self._timed, work)

    def _timed(self, work: Callable[[], T]) -> T:
        began = time.monotonic()
        try:
            return work()
        finally:
            self._busy_s += time.monotonic() - began

    def _report(self) -> None:
        self._reporter.report(
            (
                Sample("weft_encoder_frames", self._frames),
                Sample("weft_encoder_seconds", self._busy_s),
                Sample("weft_encoder_videos", self._videos),
            )
        )
