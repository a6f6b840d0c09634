"""The sound of a video: encoded as the container takes it, as long as the frames are shown."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

import av
import numpy as np

from deployments.media.video_spec import Sound

ENCODERS = {"mp4": "aac", "webm": "libopus"}
RATES = {  # of each encoder, samples per second
    "aac": (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000),
    "libopus": (8_000, 12_000, 16_000, 24_000, 48_000),
}
BEST_RATE = 48_000
BITS_PER_CHANNEL = 96_000  # a second


def encoded_rate(sound: Sound, container: Literal["mp4", "webm"]) -> int:
    """The rate in the file: that of the sound where the encoder takes it."""
    return sound.rate if sound.rate in RATES[ENCODERS[container]] else BEST_RATE


def add_sound_stream(file: Any, sound: Sound, container: Literal["mp4", "webm"]) -> Any:
    """A stream for `sound` in the open file; call it before the first packet is written."""
    channels = len(sound.samples)
    stream = file.add_stream(ENCODERS[container], rate=encoded_rate(sound, container))
    stream.codec_context.layout = "mono" if channels == 1 else "stereo"
    stream.codec_context.bit_rate = channels * BITS_PER_CHANNEL
    return stream


def sound_packets(stream: Any, sound: Sound, seconds: Fraction) -> list[Any]:
    """The packets of exactly so many seconds: what is over is left out, what is missing is silence."""
    wanted = round(seconds * sound.rate)
    samples = np.clip(sound.samples[:, :wanted], -1.0, 1.0).astype(np.float32)
    samples = np.pad(samples, ((0, 0), (0, wanted - samples.shape[1])))
    layout = "mono" if len(samples) == 1 else "stereo"
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = sound.rate, 0, Fraction(1, sound.rate)
    return [*stream.encode(frame), *stream.encode(None)]
