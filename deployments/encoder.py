"""VideoEncoder: the Serve class that turns frames into video files on a CPU."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from deployments.media.video_spec import Frames, Segment, Sound, VideoFiles, VideoSpec
from deployments.observability.metrics import Reporter, Sample
from deployments.protocol.log_context import LogContext, bind, join_serve_log

T = TypeVar("T")

logger = logging.getLogger(__name__)


class VideoEncoder:
    """Encodes segments and joins them. It keeps nothing between calls, so any replica may take any call."""

    def __init__(self, threads: int = 1, concurrency: int = 2) -> None:
        """threads: for the encoding of one segment.
        concurrency: segments encoded at the same time; where one ends, another keeps the cores busy.
        """
        from deployments.media import movie  # here and not above: building the graph must not load FFmpeg

        join_serve_log("deployments")
        self._movie = movie
        self._threads = threads
        self._workers = ThreadPoolExecutor(concurrency, thread_name_prefix="encode")
        self._frames, self._videos, self._busy_s = 0, 0, 0.0
        self._reporter = Reporter()

    async def segment(
        self, spec: VideoSpec, index: int, *chunks: Frames, log_context: LogContext | None = None
    ) -> Segment:
        """Encode segment `index` of the video, given its frames in order.

        log_context: ids for the log lines of this call. Raises Internal for frames of another segment.
        """
        encode = partial(self._movie.encode_segment, spec, index, chunks, self._threads)
        segment = await self._run(encode, log_context)
        self._frames += segment.frames
        self._report()
        logger.info("segment encoded", extra={"index": index, "frames": segment.frames})
        return segment

    async def join(
        self,
        spec: VideoSpec,
        segments: Sequence[Segment],
        sound: Sound | None = None,
        *,
        log_context: LogContext | None = None,
    ) -> VideoFiles:
        """The finished video with its sound, and its stills. Raises Internal when a segment is missing."""
        files = await self._run(partial(self._movie.join, spec, segments, sound), log_context)
        self._videos += 1
        self._report()
        return files

    async def _run(self, function: Callable[[], T], log_context: LogContext | None) -> T:
        if log_context is not None:
            bind(log_context)  # this call has a task, and so a context, of its own
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        return await loop.run_in_executor(self._workers, context.run, self._timed, function)

    def _timed(self, function: Callable[[], T]) -> T:
        started = time.monotonic()
        try:
            return function()
        finally:
            self._busy_s += time.monotonic() - started

    def _report(self) -> None:
        self._reporter.report(
            (
                Sample("weft_encoder_frames_total", self._frames),
                Sample("weft_encoder_seconds_total", self._busy_s),
                Sample("weft_encoder_videos_total", self._videos),
            )
        )
