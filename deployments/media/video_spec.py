"""What model replicas and the encoder exchange: the video's specification, segments, finished files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

from deployments.protocol.errors import BadRequest

Frames = npt.NDArray[np.uint8]  # (n, height, width, 3), RGB
Samples = npt.NDArray[np.float32]  # (channels, n) in -1..1; one channel or two
SEGMENT_FRAMES = 32  # each segment starts with a key frame; 2 s at the 16 frames per second of Wan
SHEET_TILES = 25  # at most
SHEET_COLUMNS = 5
MIN_SIDE, MAX_SIDE = 16, 8192  # pixels
NTSC = Fraction(1000, 1001)  # of 24, 30 and 60 frames a second, which are written 23.976, 29.97 and 59.94
NTSC_WRITTEN = 0.005  # how far what is written may be from it


@dataclass(frozen=True, slots=True)
class VideoSpec:
    """The video file to make."""

    width: int  # pixels; both even, because colours in yuv420p have half the resolution
    height: int
    num_frames: int
    fps: float
    format: Literal["mp4", "webm"] = "mp4"
    quality: int = 80  # 1..100
    comment: str = ""  # written into the container, as is the description
    description: str = ""
    codec: Literal["h264", "vp9", "av1"] | None = None  # None: the default of the format

    def __post_init__(self) -> None:
        """Raises BadRequest for a size, length or rate that cannot be encoded."""
        if self.width % 2 or self.height % 2 or min(self.width, self.height) < MIN_SIDE:
            raise BadRequest(
                f"a video of {self.width}x{self.height} cannot be encoded; both must be even and at least "
                f"{MIN_SIDE} (scale or pad the frames before)"
            )
        if max(self.width, self.height) > MAX_SIDE or self.num_frames < 1 or not 1 <= self.fps <= 120:
            raise BadRequest(
                f"{self.num_frames} frames of {self.width}x{self.height} at {self.fps:g} a second cannot be "
                f"encoded; sides go up to {MAX_SIDE}, frames from 1, fps from 1 to 120"
            )

    @property
    def rate(self) -> Fraction:
        """Frames a second as containers hold it; 30000/1001 for 29.97."""
        if float(self.fps).is_integer():
            return Fraction(int(self.fps))
        ntsc = round(self.fps) * NTSC
        return ntsc if abs(ntsc - self.fps) <= NTSC_WRITTEN else Fraction(self.fps).limit_denominator(1001)

    @property
    def media_type(self) -> str:
        return f"video/{self.format}"

    @property
    def segments(self) -> int:
        return -(-self.num_frames // SEGMENT_FRAMES)

    @property
    def tiles(self) -> list[int]:
        """Indices of the frames in the spritesheet."""
        count = min(self.num_frames, SHEET_TILES)
        return [round(tile * (self.num_frames - 1) / max(1, count - 1)) for tile in range(count)]


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive frames as a small video file of their own, and their share of the stills."""

    index: int  # its first frame is index * SEGMENT_FRAMES
    frames: int
    data: bytes
    tiles: Mapping[int, Frames]  # small pictures (h, w, 3) by index of the frame
    poster: bytes | None  # JPEG of the video's first frame; None in all segments but the first


@dataclass(frozen=True, slots=True)
class Sound:
    """What is heard from the first frame on."""

    samples: Samples
    rate: int  # samples per second


@dataclass(frozen=True, slots=True)
class Still:
    """A picture file made from a video."""

    media_type: str
    data: bytes
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class VideoFiles:
    """A finished video file and its stills."""

    video: bytes
    poster: Still
    thumbnail: Still
    spritesheet: Still
