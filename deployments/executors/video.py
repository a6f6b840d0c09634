"""Text to video and image to video with a video model."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from deployments.engine.work import Finished
from deployments.executors.denoise import denoise
from deployments.executors.run import Run
from deployments.executors.video_output import encoding_session, finish_video
from deployments.pipelines.latent_decoder import LatentDecoder
from deployments.protocol.events import Event, Stage


async def generate_video(run: Run) -> AsyncGenerator[Event]:
    """The request's events: Stage for decoded and encoded frames, the video's files, Done.

    The video leaves its slot of the engine after its last denoising step: frames are decoded on
    a thread of their own and encoded by another process, both at once.
    """
    async with aclosing(denoise(run)) as items:
        async for item in items:
            if not isinstance(item, Finished):
                yield item
                continue
            async with aclosing(_decode_and_encode(run, item)) as events:
                async for event in events:
                    yield event


async def _decode_and_encode(run: Run, finished: Finished) -> AsyncGenerator[Event]:
    started = time.monotonic()
    decoder: LatentDecoder = finished.value[0]
    async with encoding_session(run, decoder.total) as session:
        decoded = encoded = 0
        while (frames := await run.decode_thread.next_frames(decoder, run.device_time)) is not None:
            decoded += len(frames)
            yield Stage("decode", decoded, decoder.total)
            await session.add(frames)
            if session.encoded > encoded:
                encoded = session.encoded
                yield Stage("encode", encoded, decoder.total)
        session.sound = await run.decode_thread.sound(decoder)
        rest = finish_video(run, session, finished.queued_s, finished.run_s, started, finished.unproven)
        async with aclosing(rest) as events:
            async for event in events:
                yield event
