"""A video of a picture model: every frame is a picture of its own in the engine, many at a time."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from functools import partial

import numpy as np
from PIL.Image import Image

from deployments.engine.work import Finished
from deployments.executors.denoise import denoise
from deployments.executors.frame_scheduler import FrameReady, FrameScheduler
from deployments.executors.run import Run
from deployments.executors.video_output import encoding_session, finish_video
from deployments.media import still
from deployments.pipelines.framewise import VideoFrame
from deployments.protocol.card import ModelCard
from deployments.protocol.events import Event, Failed, Preview, Queued, Stage, Started, Step
from deployments.protocol.request import ResolvedEdit, ResolvedRequest, ResolvedVideo
from deployments.validation.preview_steps import preview_steps
from deployments.validation.resolve import denoising_steps

MAX_FRAMES_IN_FLIGHT = 16  # of one video in the engine


async def generate_framewise_video(run: Run) -> AsyncGenerator[Event]:
    """The request's events. Its frames share their forwards with each other and with other requests.

    Its previews are finished frames, at even distances.
    """
    video = _video_of(run.request)
    total_steps = _total_steps(run.request, run.model.card)
    started = time.monotonic()
    queued_s = 0.0
    unproven: set[str] = set()
    frames, shown_frames = 0, preview_steps(video.num_frames, run.request.output.previews)
    async with (
        encoding_session(run, video.num_frames) as session,
        aclosing(_frames(run)) as events,
    ):
        encoded = steps_done = 0
        async for event in events:
            match event:
                case FrameReady(image=image):
                    unproven |= event.unproven
                    frames += 1
                    if frames in shown_frames:
                        yield await asyncio.to_thread(_preview, steps_done, image)
                    await session.add(np.asarray(image, dtype=np.uint8)[None])
                    if session.encoded > encoded:
                        encoded = session.encoded
                        yield Stage("encode", encoded, video.num_frames)
                case Started():
                    queued_s, started = time.monotonic() - started, time.monotonic()
                    yield Started(total_steps)
                case Step():
                    steps_done += 1
                    yield Step(steps_done, total_steps)
                case Failed():
                    yield event
                    return
                case _:
                    yield event
        rest = finish_video(run, session, queued_s, 0.0, started, unproven)
        async with aclosing(rest) as events:
            async for event in events:
                yield event


async def _frames(run: Run) -> AsyncGenerator[Event | FrameReady]:
    """FrameReady in the order of the frames, between the events of all frames.

    Where the camera moves over a picture and none was given, the request's own picture is made first.
    """
    video, source = _video_of(run.request), run.request
    unproven: frozenset[str] = frozenset()  # of the picture that every frame starts from
    if _starts_from_own_picture(run.request):
        async with FrameScheduler(partial(_frame_events, run, source), 1, 1) as events:
            async for event in events:
                if isinstance(event, FrameReady):
                    unproven = event.unproven
                    source = _with_image(
                        run.request, run.model.card, await asyncio.to_thread(_png, event.image)
                    )
                    continue
                yield event
                if isinstance(event, Failed):
                    return
    window = min(run.worker.slots, MAX_FRAMES_IN_FLIGHT)
    async with FrameScheduler(partial(_frame_events, run, source), video.num_frames, window) as events:
        async for event in events:
            if isinstance(event, FrameReady):
                yield replace(event, unproven=event.unproven | unproven)
            elif source is run.request or not isinstance(event, Queued | Started):
                yield event


async def _frame_events(run: Run, source: ResolvedRequest, index: int) -> AsyncGenerator[Event | FrameReady]:
    """The events of one frame as a picture; FrameReady or Failed is the last."""
    output = source.output.model_copy(update={"previews": 0})
    picture = source.model_copy(update={"video": None, "output": output})
    frame = VideoFrame(_video_of(source), index)
    frame_run = replace(run, request=picture, resume=None, checkpoints=None, frame=frame)
    async with aclosing(denoise(frame_run)) as items:
        async for item in items:
            yield FrameReady(item.value[0], item.unproven) if isinstance(item, Finished) else item


def _preview(steps_done: int, frame: Image) -> Preview:
    return Preview(steps_done, "image/webp", still.preview(frame, frame.width, frame.height))


def _video_of(request: ResolvedRequest) -> ResolvedVideo:
    assert request.video is not None, "a frame-wise video"
    return request.video


def _starts_from_own_picture(request: ResolvedRequest) -> bool:
    return _video_of(request).moves and request.edit is None


def _with_image(request: ResolvedRequest, card: ModelCard, image: bytes) -> ResolvedRequest:
    """The request whose frames start from this picture, by the card's strength if that leaves a step."""
    for strength in (card.strength, 1.0):
        edit = ResolvedEdit(image=image, strength=strength)
        changed = request.model_copy(update={"edit": edit})
        if denoising_steps(changed, card) > 0:
            break
    return changed


def _total_steps(request: ResolvedRequest, card: ModelCard) -> int:
    """Denoising steps of all pictures of the video."""
    steps, num_frames = denoising_steps(request, card), _video_of(request).num_frames
    if _starts_from_own_picture(request):
        return steps + num_frames * denoising_steps(_with_image(request, card, b""), card)
    return num_frames * steps


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
