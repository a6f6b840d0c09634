"""Video files: the frames that went in come out, in order and number, whatever the segments."""

from __future__ import annotations

import io
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deployments.media import movie
from deployments.media.video_spec import SEGMENT_FRAMES, Segment, VideoSpec
from deployments.protocol.errors import BadRequest, Internal
from tests.inference.video_files import Frames, clip, decibels, decode_video

CODEC_DB = 33.0  # a frame against itself after the codec; against its neighbours: below 25


def segments_of(spec: VideoSpec, frames: Frames, threads: int = 1) -> list[Segment]:
    cut = [frames[i : i + SEGMENT_FRAMES] for i in range(0, len(frames), SEGMENT_FRAMES)]
    return [movie.encode_segment(spec, i, [part], threads) for i, part in enumerate(cut)]


@pytest.mark.parametrize(("form", "codec"), [("mp4", None), ("webm", None), ("webm", "av1")])
@pytest.mark.parametrize("count", [1, 17, 32, 33, 129])
def test_every_frame_is_decoded_in_its_order(count: int, form: Any, codec: Any) -> None:
    frames, spec = clip(count), VideoSpec(64, 48, count, 24, form, codec=codec)

    shown = decode_video(movie.join(spec, segments_of(spec, frames)).video)

    assert len(shown.frames) == count
    assert min(decibels(a, b) for a, b in zip(shown.frames, frames, strict=True)) > CODEC_DB
    assert max((decibels(a, b) for a, b in zip(shown.frames[1:], frames, strict=False)), default=0) < CODEC_DB


@pytest.mark.parametrize(
    ("form", "codec", "decoder"),
    [("mp4", "h264", "h264"), ("webm", "vp9", "vp9"), ("webm", "av1", "av1")],
)
def test_frame_rate_length_pixels_and_colours_are_as_requested(form: Any, codec: Any, decoder: str) -> None:
    spec = VideoSpec(64, 48, 65, 8, form, codec=codec)

    shown = decode_video(movie.join(spec, segments_of(spec, clip(65))).video)

    assert shown.times_s == pytest.approx([k / 8 for k in range(65)], abs=1e-3)
    assert shown.duration_s == pytest.approx(65 / 8, abs=0.01)
    assert (shown.pixel_format, shown.colours) == ("yuv420p", (1, 1, 1, 1))
    assert decoder in shown.codec
    assert {0, 32, 64} <= set(shown.key_frames), "a viewer may jump to the start of any segment"


@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (24, Fraction(24)),
        (24.0, Fraction(24)),
        (29.97, Fraction(30000, 1001)),
        (30000 / 1001, Fraction(30000, 1001)),
        (23.976, Fraction(24000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (12.5, Fraction(25, 2)),
    ],
)
def test_the_rate_of_a_container_is_the_one_that_a_decimal_stands_for(fps: float, rate: Fraction) -> None:
    assert VideoSpec(64, 48, 1, fps).rate == rate


@pytest.mark.parametrize("form", ["mp4", "webm"])
def test_a_fractional_frame_rate_is_that_of_the_file(form: Any) -> None:
    frames, spec = clip(65), VideoSpec(64, 48, 65, 29.97, form)

    shown = decode_video(movie.join(spec, segments_of(spec, frames)).video)

    assert len(shown.frames) == 65
    assert shown.times_s == pytest.approx([k * 1001 / 30000 for k in range(65)], abs=1e-3)
    assert shown.duration_s == pytest.approx(65 * 1001 / 30000, abs=0.01)


def test_an_mp4_plays_before_it_is_loaded() -> None:
    spec = VideoSpec(64, 48, 40, 8)

    data = movie.join(spec, segments_of(spec, clip(40))).video

    assert 0 < data.find(b"moov") < data.find(b"mdat")


@pytest.mark.parametrize("form", ["mp4", "webm"])
def test_the_file_says_how_it_was_made(form: str) -> None:
    spec = VideoSpec(64, 48, 2, 8, form, comment="ein Fuchs\nSteps: 3", description='{"seed": 7}')  # type: ignore[arg-type]

    shown = decode_video(movie.join(spec, segments_of(spec, clip(2))).video)

    assert shown.metadata["comment"] == "ein Fuchs\nSteps: 3"
    assert shown.metadata["description"] == '{"seed": 7}'


def test_frames_may_come_in_any_chunks() -> None:
    frames, spec = clip(20), VideoSpec(64, 48, 20, 8)

    segment = movie.encode_segment(spec, 0, [frames[:1], frames[1:9], frames[9:]], 1)

    # not compared byte by byte: x264 with AVX-512 does not repeat itself to the bit
    shown = decode_video(segment.data).frames
    assert min(decibels(a, b) for a, b in zip(shown, frames, strict=True)) > CODEC_DB


@pytest.mark.parametrize(("form", "codec"), [("mp4", "h264"), ("webm", "vp9"), ("webm", "av1")])
def test_higher_quality_is_nearer_to_the_frames_and_larger(form: Any, codec: Any) -> None:
    frames = clip(16)
    files = []
    for quality in (10, 80, 100):
        spec = VideoSpec(64, 48, 16, 8, form, quality, codec=codec)
        files.append(movie.join(spec, segments_of(spec, frames)).video)

    likeness = [decibels(decode_video(data).frames, frames) for data in files]

    assert likeness == sorted(likeness)
    assert [len(data) for data in files] == sorted(len(data) for data in files)


def test_poster_thumbnail_and_spritesheet_show_the_frames() -> None:
    frames, spec = clip(25, 240, 320), VideoSpec(320, 240, 25, 8)

    files = movie.join(spec, segments_of(spec, frames))

    poster, thumbnail, sheet = (
        Image.open(io.BytesIO(still.data)).convert("RGB")
        for still in (files.poster, files.thumbnail, files.spritesheet)
    )
    assert (poster.size, thumbnail.size, sheet.size) == ((320, 240), (320, 240), (5 * 160, 5 * 120))
    assert decibels(np.asarray(poster), frames[0]) > 30
    middle, last = (np.asarray(Image.fromarray(frames[k]).resize((160, 120))) for k in (12, 24))
    assert decibels(np.asarray(sheet.crop((320, 240, 480, 360))), middle) > 28
    assert decibels(np.asarray(sheet.crop((640, 480, 800, 600))), last) > 28


@pytest.mark.parametrize(("width", "height"), [(63, 48), (64, 47), (64, 14), (8194, 64)])
def test_sizes_that_cannot_be_encoded_are_refused_at_once(width: int, height: int) -> None:
    with pytest.raises(BadRequest, match=f"{width}x{height}"):
        VideoSpec(width, height, 1, 8)


def test_frames_that_are_not_those_of_the_segment_are_refused() -> None:
    spec = VideoSpec(64, 48, 40, 8)

    with pytest.raises(Internal, match="needs 32 frames"):
        movie.encode_segment(spec, 0, [clip(31)], 1)
    with pytest.raises(Internal, match="needs 8 frames"):
        movie.encode_segment(spec, 1, [clip(8, 48, 48)], 1)


def test_a_video_with_a_missing_segment_is_never_joined() -> None:
    spec = VideoSpec(64, 48, 96, 8)
    first, _, third = segments_of(spec, clip(96))

    with pytest.raises(Internal, match="are not all 3 of the video"):
        movie.join(spec, [first, third])


def test_the_exchanged_types_load_no_av() -> None:
    code = "import sys, deployments.media.video_spec; sys.exit('av' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
