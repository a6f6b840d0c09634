"""Frames to encode, and what a video file contains."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

Frames = npt.NDArray[np.uint8]
ROOT = Path(__file__).parents[2]


def clip(count: int, height: int = 48, width: int = 64) -> Frames:
    """(count, height, width, 3): moving waves, so that every frame is different."""
    rows, columns = np.mgrid[0:height, 0:width]
    frames = [
        np.stack(
            [
                128 + 90 * np.sin(columns / 19 + k / 5),
                128 + 90 * np.sin(rows / 17 + k / 8),
                128 + 90 * np.cos((rows + columns) / 23 - k / 6),
            ],
            axis=-1,
        )
        for k in range(count)
    ]
    return np.stack(frames).astype(np.uint8)


def png(width: int = 64, height: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(clip(1, height, width)[0]).save(buffer, "PNG")
    return buffer.getvalue()


def decibels(frames: npt.NDArray[Any], others: npt.NDArray[Any]) -> float:
    """Peak signal to noise ratio of two pictures or clips, dB."""
    error = np.mean((frames.astype(np.float64) - others.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


@dataclass(frozen=True)
class DecodedVideo:
    """The contents of a video file, as a player reads them."""

    frames: Frames
    times_s: list[float]
    pixel_format: str
    colours: tuple[int, int, int, int]  # matrix, range, primaries, transfer; 1: BT.709, limited range
    codec: str
    duration_s: float
    key_frames: list[int]
    metadata: dict[str, str]


def decode_video(data: bytes) -> DecodedVideo:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        shown = list(container.decode(stream))
        return DecodedVideo(
            np.stack([f.to_ndarray(format="rgb24", src_colorspace="ITU709") for f in shown]),
            [float(frame.time or 0.0) for frame in shown],
            str(codec.pix_fmt),
            (codec.colorspace, codec.color_range, codec.color_primaries, codec.color_trc),
            codec.name,
            (container.duration or 0) / av.time_base,
            [number for number, frame in enumerate(shown) if frame.key_frame],
            {key.lower(): value for key, value in container.metadata.items()},
        )
