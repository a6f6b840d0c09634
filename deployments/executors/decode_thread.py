"""The thread that decodes videos, so that their engine slot serves the next request meanwhile."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from deployments.engine.device_streams import decode_stream
from deployments.engine.device_time import DeviceTime
from deployments.engine.out_of_memory import free_device_memory, is_out_of_memory, shortage
from deployments.media.video_spec import Frames, Sound
from deployments.pipelines.latent_decoder import DeviceSound, LatentDecoder
from deployments.protocol.errors import ModelUnavailable, OutOfMemory

logger = logging.getLogger(__name__)

RunBetweenSteps = Callable[[Callable[[], Frames | None]], Awaitable[Frames | None]]


class DecodeThread:
    """Decodes some frames of one video at a time; several videos take turns."""

    def __init__(
        self, watchdog_s: float, run_between_steps: RunBetweenSteps, device: torch.device | None = None
    ) -> None:
        """watchdog_s: a single call of a decoder that takes longer is regarded as hung. run_between_steps:
        runs a function while no step is computed. device: of the videos."""
        self.frames = 0  # decoded so far
        self.seconds = 0.0  # that this took
        self._watchdog_s = watchdog_s
        self._run_between_steps = run_between_steps
        self._busy_since: float | None = None  # time.monotonic()
        self._stream = decode_stream(device or torch.device("cpu"))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decode")

    async def next_frames(self, decoder: LatentDecoder, device_time: DeviceTime) -> Frames | None:
        """The video's next frames (n, H, W, 3); None after the last. device_time: of its request.

        Raises OutOfMemory when the device's memory does not suffice, also while no step is computed.
        """
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self._decode, decoder, device_time)
        except OutOfMemory:
            logger.warning("out of memory, the frames are decoded between two steps")
        return await self._run_between_steps(partial(self._decode, decoder, device_time))

    async def sound(self, decoder: LatentDecoder) -> Sound | None:
        """What the model made to be heard with the frames; None for a silent video."""
        if decoder.sound is None:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._copy_sound, decoder.sound)

    def check(self) -> None:
        """Raises ModelUnavailable if the decoder hangs."""
        since = self._busy_since
        if since is not None and time.monotonic() - since > self._watchdog_s:
            raise ModelUnavailable("the video decoder hangs; the replica must be replaced")

    def _copy_sound(self, sound: DeviceSound) -> Sound:
        with torch.cuda.stream(self._stream):
            return sound.here()

    def _decode(self, decoder: LatentDecoder, device_time: DeviceTime) -> Frames | None:
        began = self._busy_since = time.monotonic()
        try:
            with torch.cuda.stream(self._stream):
                frames = decoder.next_frames()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise _too_large(error) from error
        finally:
            self._busy_since = None
        self.frames += 0 if frames is None else len(frames)
        seconds = time.monotonic() - began
        self.seconds += seconds
        device_time.add(seconds)
        return frames


def _too_large(error: Exception) -> OutOfMemory:
    """The error for the video; the memory of its decoding is free again."""
    failure = OutOfMemory(
        f"the device ran out of memory while it decoded the video{shortage(error)}; "
        "ask for fewer frames or a smaller size"
    )
    error.__traceback__ = None  # its frames keep the part that was decoded
    free_device_memory()
    return failure
