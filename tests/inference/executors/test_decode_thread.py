"""The thread that decodes videos: whose turn it is, what it counts, and when it is regarded as hung."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from deployments.engine.device_time import DeviceTime
from deployments.executors.decode_thread import DecodeThread
from deployments.media.video_spec import Frames
from deployments.protocol.errors import ModelUnavailable, OutOfMemory
from tests.patience import patience
from tests.serving.fakes import eventually


class Decoder:
    """Returns its chunks one after the other, then None; raises `error` instead if it has one."""

    def __init__(self, *lengths: int, error: Exception | None = None) -> None:
        self.total = sum(lengths)
        self.sound = None
        self._chunks = [np.zeros((length, 4, 4, 3), np.uint8) for length in lengths]
        self._error = error

    def next_frames(self) -> Frames | None:
        if self._error is not None:
            raise self._error
        return self._chunks.pop(0) if self._chunks else None


class Hanging(Decoder):
    """Decodes nothing until it is released."""

    released = threading.Event()

    def next_frames(self) -> None:
        self.released.wait(patience())


async def between_steps(decode: Callable[[], Frames | None]) -> Frames | None:
    return decode()


async def test_two_videos_take_turns_and_their_frames_are_counted() -> None:
    thread, first, second = DecodeThread(60.0, between_steps), Decoder(1, 4), Decoder(2)

    lengths = []
    for decoder in (first, second, first, second, first):
        frames = await thread.next_frames(decoder, DeviceTime())
        lengths.append(None if frames is None else len(frames))

    assert lengths == [1, 2, 4, None, None]
    assert thread.frames == 7
    assert thread.seconds > 0


async def test_a_lack_of_memory_is_an_error_of_the_request_and_the_thread_continues() -> None:
    thread = DecodeThread(60.0, between_steps)

    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB."),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED; tried to allocate 2.50 GiB"),
    ):
        with pytest.raises(OutOfMemory, match=r"\(2\.5 GiB needed\); ask for fewer frames or a smaller size"):
            await thread.next_frames(Decoder(1, error=error), DeviceTime())

    assert await thread.next_frames(Decoder(3), DeviceTime()) is not None
    thread.check()


async def test_frames_that_do_not_fit_beside_a_step_are_decoded_between_two() -> None:
    """A video that fits alone must not fail by what other requests compute."""
    decoder = Decoder(3, 2, error=torch.OutOfMemoryError("beside a step"))
    repeated = []

    async def without_steps(decode: Callable[[], Frames | None]) -> Frames | None:
        repeated.append(decoder)
        decoder._error = None
        return decode()

    thread = DecodeThread(60.0, without_steps)
    lengths = [
        len(frames)
        for _ in range(2)
        if (frames := await thread.next_frames(decoder, DeviceTime())) is not None
    ]

    assert lengths == [3, 2]
    assert repeated == [decoder]
    assert thread.frames == 5


async def test_a_decoder_that_hangs_fails_the_check_until_it_returns() -> None:
    thread, hanging = DecodeThread(0.0, between_steps), Hanging(1)
    thread.check()

    call = asyncio.create_task(thread.next_frames(hanging, DeviceTime()))
    await eventually(lambda: thread._busy_since is not None, quiet_s=4)
    await asyncio.sleep(0.001)

    with pytest.raises(ModelUnavailable, match="decoder hangs"):
        thread.check()
    hanging.released.set()
    await call
    thread.check()
