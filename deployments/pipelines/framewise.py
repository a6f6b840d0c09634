"""A video from a picture model: every frame is a picture whose noise and prompt lie on a path between two,
and which may start from what a moving camera sees of one picture."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deployments.protocol.request import ResolvedVideo


def set_frame(pipeline: Any, video: ResolvedVideo, frame: int) -> None:
    """Let this request's pipeline object paint frame `frame` of the video: the first is the very picture of
    the seed and the prompt, the last that of end_seed and end_prompt.
    """
    share = _share(video, frame)
    if video.end_seed is not None and hasattr(pipeline, "prepare_latents"):
        _walk_noise(pipeline, video.end_seed, share)
    if video.end_prompt is not None and hasattr(pipeline, "encode_prompt"):
        _walk_prompt(pipeline, video.end_prompt, share)


def camera_view(
    picture: Image.Image, video: ResolvedVideo, frame: int, width: int, height: int
) -> Image.Image:
    """What frame `frame` sees of the picture, width x height pixels; past its edges it is mirrored.

    The first frame sees the whole. Zoom is by equal factors, so that it looks steady.
    """
    share = _share(video, frame)
    nearness = (video.zoom or 1.0) ** share
    across, down = picture.width / nearness, picture.height / nearness
    left = picture.width * (0.5 + (video.pan_x or 0.0) * share) - across / 2
    top = picture.height * (0.5 + (video.pan_y or 0.0) * share) - down / 2
    margins = (
        max(0, math.ceil(-left)),
        max(0, math.ceil(left + across - picture.width)),
        max(0, math.ceil(-top)),
        max(0, math.ceil(top + down - picture.height)),
    )
    if any(margins):
        before, after, above, below = margins
        pixels = np.pad(np.asarray(picture), ((above, below), (before, after), (0, 0)), mode="symmetric")
        picture, left, top = Image.fromarray(pixels), left + before, top + above
    right, bottom = min(left + across, picture.width), min(top + down, picture.height)
    return picture.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, right, bottom))


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """From start to end on the sphere: what is between two Gaussian noises is one, a straight mean is not."""
    if share == 0:
        return start
    if share == 1:
        return end
    a, b = start.float().flatten(), end.float().flatten()
    angle = torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    if float(angle) < 1e-4:
        return torch.lerp(start, end, share)
    near, far = torch.sin((1 - share) * angle), torch.sin(share * angle)
    return ((near * start.float() + far * end.float()) / torch.sin(angle)).to(start.dtype)


def lerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """The straight way, for embeddings; what is equal in both, or no number, stays as it is."""
    if share == 0 or start.shape != end.shape or not start.is_floating_point():
        return start
    return end if share == 1 else torch.lerp(start, end, share)


def _share(video: ResolvedVideo, frame: int) -> float:
    """How far along the way this frame is, 0..1."""
    return frame / max(1, video.num_frames - 1)


def _walk_noise(pipeline: Any, end_seed: int, share: float) -> None:
    prepare = pipeline.prepare_latents
    parameters = inspect.signature(prepare)

    def between(*args: Any, **kwargs: Any) -> Any:
        start = prepare(*args, **kwargs)
        bound = parameters.bind(*args, **kwargs)
        generator = torch.Generator(device="cpu").manual_seed(end_seed)
        given = bound.arguments["generator"]
        bound.arguments["generator"] = [generator] if isinstance(given, list) else generator
        return _each(start, prepare(*bound.args, **bound.kwargs), share, slerp)

    vars(pipeline)["prepare_latents"] = between


def _walk_prompt(pipeline: Any, end_prompt: str, share: float) -> None:
    encode = pipeline.encode_prompt
    parameters = inspect.signature(type(pipeline).encode_prompt)

    def between(*args: Any, **kwargs: Any) -> Any:
        start = encode(*args, **kwargs)
        bound = parameters.bind(pipeline, *args, **kwargs)
        bound.arguments["prompt"] = end_prompt
        bound.arguments.pop("prompt_2", None)  # pipelines with a second encoder take the prompt for both
        named = {name: value for name, value in bound.arguments.items() if name != "self"}
        return _each(start, encode(**named), share, lerp)

    vars(pipeline)["encode_prompt"] = between


def _each(start: Any, end: Any, share: float, mix: Callable[[Tensor, Tensor, float], Tensor]) -> Any:
    """Mix the tensors of two answers of the same shape; the first tensor is the noise, and ids are equal."""
    if isinstance(start, Tensor):
        return mix(start, end, share)
    if isinstance(start, tuple | list):
        return type(start)(_each(a, b, share, mix) for a, b in zip(start, end, strict=True))
    return start
