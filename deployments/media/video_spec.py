"""What travels between a video model and the encoder: the order, encoded segments, finished files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from deployments.protocol.errors import BadRequest

Frames = npt.NDArray[np.uint8]  # (n, height, width, 3), RGB
SEGMENT_FRAMES = 32  # encoded by themselves, each beginning with a key frame: 2 s at Wan's 16 frames a second
SHEET_TILES = 25  # at most, in rows of 5
SHEET_COLUMNS = 5
MIN_SIDE, MAX_SIDE = 16, 8192  # pixels


@dataclass(frozen=True, slots=True)
class VideoSpec:
    """The video file that shall be made."""

    width: int  # pixels; both even, because the colours of yuv420p have half the resolution
    height: int
    num_frames: int
    fps: int
    format: Literal["mp4", "webm"] = "mp4"
    quality: int = 80  # 1..100
    comment: str = ""  # both go into the container
    description: str = ""
    codec: Literal["h264", "vp9", "av1"] | None = None  # None: the usual one of the format

    def __post_init__(self) -> None:
        """Raises BadRequest for what cannot be encoded."""
        if self.width % 2 or self.height % 2 or min(self.width, self.height) < MIN_SIDE:
            raise BadRequest(
                f"a video of {self.width}x{self.height} cannot be encoded; both must be even and at least "
                f"{MIN_SIDE} (scale or pad the frames before)"
            )
        if max(self.width, self.height) > MAX_SIDE or self.num_frames < 1 or not 1 <= self.fps <= 120:
            raise BadRequest(
                f"{self.num_frames} frames of {self.width}x{self.height} at {self.fps} a second cannot be "
                f"encoded; sides go up to {MAX_SIDE}, frames from 1, fps from 1 to 120"
            )

    @property
    def media_type(self) -> str:
        return f"video/{self.format}"

    @property
    def segments(self) -> int:
        return -(-self.num_frames // SEGMENT_FRAMES)

    @property
    def tiles(self) -> list[int]:
        """Numbers of the frames that the spritesheet shows."""
        count = min(self.num_frames, SHEET_TILES)
        return [round(tile * (self.num_frames - 1) / max(1, count - 1)) for tile in range(count)]


@dataclass(frozen=True, slots=True)
class Segment:
    """Some frames in a row as a small video file of their own, and what they give to stills."""

    index: int  # frames index * SEGMENT_FRAMES and on
    frames: int
    data: bytes
    tiles: Mapping[int, Frames]  # small pictures (h, w, 3) by number of frame
    poster: bytes | None  # JPEG of the video's first frame, from the first segment


@dataclass(frozen=True, slots=True)
class Still:
    """A picture file."""

    media_type: str
    data: bytes
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class VideoFiles:
    """A finished video and its pictures."""

    video: bytes
    poster: Still
    thumbnail: Still
    spritesheet: Still
