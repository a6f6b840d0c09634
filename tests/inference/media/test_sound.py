"""Sound beside frames: as long as they are shown, in step with them, at the rate that was given."""

from __future__ import annotations

import io
from typing import Any, Literal

import av
import numpy as np
import pytest

from deployments.media.movie import encode_segment, join
from deployments.media.video_spec import Sound, VideoSpec
from tests.inference.video_files import clip

FPS, FRAMES = 8, 20  # 2.5 seconds
CLICK_S = 1.5


def tone(rate: int, seconds: float, channels: int = 2) -> Sound:
    """Silence, then from CLICK_S on a tone of 440 Hz."""
    time = np.arange(round(rate * seconds)) / rate
    wave = 0.5 * np.sin(2 * np.pi * 440 * time) * (time >= CLICK_S)
    return Sound(np.stack([wave] * channels).astype(np.float32), rate)


def file_with(sound: Sound | None, container: Literal["mp4", "webm"]) -> bytes:
    spec = VideoSpec(64, 48, FRAMES, FPS, container)
    return join(spec, [encode_segment(spec, 0, [clip(FRAMES)], 1)], sound).video


def heard(data: bytes) -> tuple[Any, Any, int, float]:
    """Samples of the first channel, their rate, the number of channels, and the seconds of the video."""
    with av.open(io.BytesIO(data)) as file:
        stream = file.streams.audio[0]
        resampler = av.AudioResampler(format="fltp")
        frames = list(file.decode(stream))
        assert abs(frames[0].pts * frames[0].time_base) <= 1 / FPS, "it begins with the first frame"
        parts = [f.to_ndarray() for frame in frames for f in resampler.resample(frame)]
        rate, channels = stream.rate, stream.channels
    with av.open(io.BytesIO(data)) as file:
        shown = [frame.pts * frame.time_base for frame in file.decode(video=0)]
    assert len(shown) == FRAMES
    return np.concatenate(parts, axis=1)[0], rate, channels, float(shown[-1]) + 1 / FPS


@pytest.mark.parametrize("container", ["mp4", "webm"])
@pytest.mark.parametrize("seconds", [2.5, 4.0, 2.0], ids=["as long", "longer", "shorter"])
def test_sound_lasts_as_long_as_the_frames_and_is_in_step(
    container: Literal["mp4", "webm"], seconds: float
) -> None:
    samples, rate, channels, shown_s = heard(file_with(tone(24_000, seconds), container))

    assert channels == 2
    assert rate == (24_000 if container == "mp4" else 48_000)  # Opus is always decoded at 48 kHz
    assert abs(len(samples) / rate - shown_s) <= 1 / FPS
    start = np.flatnonzero(np.abs(samples) > 0.2)[0] / rate
    assert abs(start - CLICK_S) <= 1 / FPS
    assert np.abs(samples[: round(rate * (CLICK_S - 0.2))]).max() < 0.05
    tone_s = min(seconds, 2.5) - CLICK_S
    part = samples[round(rate * (CLICK_S + 0.1)) : round(rate * (CLICK_S + tone_s - 0.1))]
    assert 0.25 < np.sqrt(np.mean(part**2)) < 0.45  # of a sine of 0.5: 0.354


@pytest.mark.parametrize("container", ["mp4", "webm"])
def test_a_rate_that_the_encoder_lacks_is_raised_and_one_channel_stays_one(
    container: Literal["mp4", "webm"],
) -> None:
    samples, rate, channels, shown_s = heard(file_with(tone(17_000, 2.5, channels=1), container))

    assert (rate, channels) == (48_000, 1)
    assert abs(len(samples) / rate - shown_s) <= 1 / FPS


def test_a_video_without_sound_has_no_stream_for_it() -> None:
    with av.open(io.BytesIO(file_with(None, "mp4"))) as file:
        assert len(file.streams.audio) == 0
