"""Frames of a frame-wise video: each is a picture between two noises and two prompts of a picture model, and
may start from what a moving camera sees of one picture."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_map

from deployments.protocol.request import ResolvedVideo


@dataclass(frozen=True, slots=True)
class VideoFrame:
    """One frame of a frame-wise video."""

    video: ResolvedVideo
    index: int  # 0..num_frames-1

    @property
    def position(self) -> float:
        """How far into the video the frame is, 0..1."""
        return self.index / max(1, self.video.num_frames - 1)


def set_frame(pipeline: Any, frame: VideoFrame) -> None:
    """Have this request's pipeline object make `frame`: the first frame is the picture of the seed and the
    prompt, the last that of end_seed and end_prompt.
    """
    if frame.video.end_seed is not None and hasattr(pipeline, "prepare_latents"):
        _interpolate_noise(pipeline, frame.video.end_seed, frame.position)
    if frame.video.end_prompt is not None and hasattr(pipeline, "encode_prompt"):
        _interpolate_prompt(pipeline, frame.video.end_prompt, frame.position)


def camera_view(picture: Image.Image, frame: VideoFrame, width: int, height: int) -> Image.Image:
    """What the camera sees of the picture in `frame`, width x height pixels; mirrored beyond its edges.

    The first frame shows the whole picture. Zoom grows by equal factors, so that it looks steady.
    """
    video, position = frame.video, frame.position
    zoom = (video.zoom or 1.0) ** position
    view_width, view_height = picture.width / zoom, picture.height / zoom
    left = picture.width * (0.5 + (video.pan_x or 0.0) * position) - view_width / 2
    top = picture.height * (0.5 + (video.pan_y or 0.0) * position) - view_height / 2
    margins = (
        max(0, math.ceil(-left)),
        max(0, math.ceil(left + view_width - picture.width)),
        max(0, math.ceil(-top)),
        max(0, math.ceil(top + view_height - picture.height)),
    )
    if any(margins):
        before, after, above, below = margins
        pixels = np.pad(np.asarray(picture), ((above, below), (before, after), (0, 0)), mode="symmetric")
        picture, left, top = Image.fromarray(pixels), left + before, top + above
    right, bottom = min(left + view_width, picture.width), min(top + view_height, picture.height)
    return picture.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, right, bottom))


def slerp(start: Tensor, end: Tensor, position: float) -> Tensor:
    """Spherical interpolation: between two Gaussian noises it gives one, a straight mean does not."""
    if position == 0:
        return start
    if position == 1:
        return end
    a, b = start.float().flatten(), end.float().flatten()
    angle = torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    if float(angle) < 1e-4:
        return torch.lerp(start, end, position)
    from_start, from_end = torch.sin((1 - position) * angle), torch.sin(position * angle)
    return ((from_start * start.float() + from_end * end.float()) / torch.sin(angle)).to(start.dtype)


def lerp(start: Tensor, end: Tensor, position: float) -> Tensor:
    """Linear interpolation of embeddings; `start` for tensors of different shapes or without fractions."""
    if position == 0 or start.shape != end.shape or not start.is_floating_point():
        return start
    return end if position == 1 else torch.lerp(start, end, position)


def _interpolate_noise(pipeline: Any, end_seed: int, position: float) -> None:
    prepare = pipeline.prepare_latents
    parameters = inspect.signature(prepare)

    def interpolated(*args: Any, **kwargs: Any) -> Any:
        start = prepare(*args, **kwargs)
        bound = parameters.bind(*args, **kwargs)
        generator = torch.Generator(device="cpu").manual_seed(end_seed)
        given = bound.arguments["generator"]
        bound.arguments["generator"] = [generator] if isinstance(given, list) else generator
        return _interpolate(start, prepare(*bound.args, **bound.kwargs), position, slerp)

    vars(pipeline)["prepare_latents"] = interpolated


def _interpolate_prompt(pipeline: Any, end_prompt: str, position: float) -> None:
    encode = pipeline.encode_prompt
    parameters = inspect.signature(type(pipeline).encode_prompt)

    def interpolated(*args: Any, **kwargs: Any) -> Any:
        start = encode(*args, **kwargs)
        bound = parameters.bind(pipeline, *args, **kwargs)
        bound.arguments["prompt"] = end_prompt
        bound.arguments.pop("prompt_2", None)  # pipelines with a second encoder take the prompt for both
        named = {name: value for name, value in bound.arguments.items() if name != "self"}
        return _interpolate(start, encode(**named), position, lerp)

    vars(pipeline)["encode_prompt"] = interpolated


def _interpolate(
    start: Any, end: Any, position: float, between: Callable[[Tensor, Tensor, float], Tensor]
) -> Any:
    """`start` with its tensors interpolated towards those of `end`, which has the same structure."""

    def leaf(a: Any, b: Any) -> Any:
        return between(a, b, position) if isinstance(a, Tensor) else a

    return tree_map(leaf, start, end)
