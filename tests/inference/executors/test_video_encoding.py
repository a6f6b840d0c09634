"""Frames on their way to the encoder: in any chunks, through lost encoders, and nothing when cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from deployments import encoder_client
from deployments.encoder import VideoEncoder
from deployments.encoder_client import RemoteEncoder
from deployments.executors.video_encoding import SEGMENTS_IN_FLIGHT, EncodingSession
from deployments.media.video_spec import SEGMENT_FRAMES, Frames, Segment, Sound, VideoFiles, VideoSpec
from deployments.protocol.errors import Internal, ModelUnavailable
from deployments.protocol.log_context import LogContext
from tests.inference.video_files import clip, decibels, decode_video
from tests.serving.fakes import eventually


class Gated:
    """An encoder that waits for leave before each segment."""

    def __init__(self) -> None:
        self.encoder = VideoEncoder()
        self.leave = asyncio.Semaphore(0)
        self.asked: list[int] = []
        self.cancelled: list[int] = []

    async def segment(self, spec: VideoSpec, index: int, *chunks: Frames) -> Segment:
        self.asked.append(index)
        try:
            await self.leave.acquire()
        except asyncio.CancelledError:
            self.cancelled.append(index)
            raise
        return await self.encoder.segment(spec, index, *chunks)

    async def join(
        self, spec: VideoSpec, segments: Sequence[Segment], sound: Sound | None = None
    ) -> VideoFiles:
        return await self.encoder.join(spec, segments, sound)


@pytest.fixture
def gated() -> Gated:
    return Gated()


@pytest.mark.parametrize("size", [1, 4, 31, 33, 100])
async def test_frames_in_chunks_of_any_size_become_the_whole_video(size: int) -> None:
    frames, spec = clip(70), VideoSpec(64, 48, 70, 8)

    async with EncodingSession(VideoEncoder(), spec) as work:
        for start in range(0, 70, size):
            await work.add(frames[start : start + size])
        files = await work.files()

    shown = decode_video(files.video).frames
    assert shown.shape == frames.shape
    assert min(decibels(a, b) for a, b in zip(shown, frames, strict=True)) > 33
    assert work.encoded == 70


async def test_encoding_starts_before_the_last_frame(gated: Gated) -> None:
    async with EncodingSession(gated, VideoSpec(64, 48, 129, 8)) as work:
        await work.add(clip(SEGMENT_FRAMES))
        await eventually(lambda: gated.asked == [0], 60)
        gated.leave.release()
        await work.add(clip(SEGMENT_FRAMES))
        await eventually(lambda: gated.asked == [0, 1], 60)


async def test_decoding_waits_when_the_encoder_is_behind(gated: Gated) -> None:
    frames = clip(SEGMENT_FRAMES)
    async with EncodingSession(gated, VideoSpec(64, 48, 129, 8)) as work:
        for _ in range(SEGMENTS_IN_FLIGHT):
            await work.add(frames)

        third = asyncio.create_task(work.add(frames))
        await eventually(lambda: len(gated.asked) == SEGMENTS_IN_FLIGHT, 60)
        waiting = not third.done()
        gated.leave.release()
        await third

        assert waiting
        assert work.encoded == SEGMENT_FRAMES


async def test_leaving_early_cancels_running_calls(gated: Gated) -> None:
    async with EncodingSession(gated, VideoSpec(64, 48, 129, 8)) as work:
        await work.add(clip(SEGMENT_FRAMES))
        await eventually(lambda: gated.asked == [0], 60)

    assert gated.cancelled == [0]


class Response:
    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.cancelled = False

    def __await__(self) -> Any:
        return self._answer().__await__()

    async def _answer(self) -> Any:
        if self.outcome is None:
            await asyncio.Event().wait()
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A Serve handle whose calls return or raise the given results, one after the other."""

    def __init__(self, *outcomes: Any) -> None:
        self.responses = [Response(outcome) for outcome in outcomes]
        self.calls: list[tuple[Any, ...]] = []
        self.segment = self

    def remote(self, *arguments: Any, log_context: LogContext) -> Response:
        self.calls.append(arguments)
        return self.responses[len(self.calls) - 1]


SPEC, FRAMES = VideoSpec(64, 48, 8, 8), clip(8)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_client, "RETRY_FIRST_S", 0.0)


async def test_a_segment_whose_encoder_died_is_sent_again_with_the_same_frames() -> None:
    segment = Segment(0, 8, b"", {}, b"")
    handle = Handle(ActorDiedError(), ActorDiedError(), segment)

    answer = await RemoteEncoder(handle).segment(SPEC, 0, FRAMES)

    assert answer is segment
    assert all(np.array_equal(call[2], FRAMES) for call in handle.calls)
    assert len(handle.calls) == 3


async def test_an_encoder_that_dies_every_time_is_a_retryable_failure() -> None:
    handle = Handle(*[ActorDiedError()] * encoder_client.TRIES)

    with pytest.raises(ModelUnavailable, match="lost 4 times") as failure:
        await RemoteEncoder(handle).segment(SPEC, 0, FRAMES)

    assert failure.value.retryable


async def test_an_error_of_the_encoder_itself_is_not_retried() -> None:
    refusal = RayTaskError("segment", "traceback", Internal("segment 0 needs 8 frames"))
    handle = Handle(refusal)

    with pytest.raises(Internal, match="needs 8 frames"):
        await RemoteEncoder(handle).segment(SPEC, 0, FRAMES)

    assert len(handle.calls) == 1


async def test_a_cancelled_wait_cancels_the_call_on_its_replica() -> None:
    handle = Handle(None)
    waiting = asyncio.create_task(RemoteEncoder(handle).segment(SPEC, 0, FRAMES))
    await eventually(lambda: bool(handle.calls), 60)

    waiting.cancel()

    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert handle.responses[0].cancelled
