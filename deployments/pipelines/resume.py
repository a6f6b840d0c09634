"""Stopping a denoising loop between two steps and continuing it on another replica.

Possible for pipelines that take latents and the remaining noise levels, with a noise scheduler that keeps no
history: FLUX text-to-image. The picture is bit-equal to that of an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from deployments.protocol.request import ResolvedRequest

RESUMABLE = frozenset({"FluxPipeline"})


@dataclass(slots=True)
class Progress:
    """How far the denoising of a picture is; updated by its pipeline call after every step."""

    step: int = 0  # finished steps
    latents: Tensor | None = None  # after that step, as the pipeline packs them; never changed in place
    before: int = 0  # steps that were done when the running pipeline object was called
    after: int = 0  # steps of another pipeline object that come after its own
    resumable: bool = False
    # modules whose forwards were shared in batch sizes not proven exact, on this and on earlier replicas
    unproven: frozenset[str] = frozenset()


def save(pictures: Sequence[Progress]) -> bytes | None:
    """The state of all pictures of a request for `restore`.

    None before the first step of any, and for pipelines that cannot be resumed.
    """
    tensors = {
        f"latents.{index}": picture.latents.detach().cpu().clone(memory_format=torch.contiguous_format)
        for index, picture in enumerate(pictures)
        if picture.resumable and picture.latents is not None
    }
    if not tensors:
        return None
    unproven = frozenset[str]().union(*(picture.unproven for picture in pictures))
    names = torch.tensor(list("\n".join(sorted(unproven)).encode()), dtype=torch.uint8)
    steps = torch.tensor([picture.step for picture in pictures])
    return bytes_of(tensors | {"steps": steps, "unproven": names})


def restore(state: bytes, request: ResolvedRequest) -> list[Progress] | None:
    """The progress of all pictures from the bytes of `save`. Those without latents of a step before the last
    start anew; None: all of them do, because the state does not match the request.
    """
    try:
        tensors = tensors_of(state)
        steps = [int(step) for step in tensors["steps"]]
        unproven = frozenset(bytes(tensors["unproven"].tolist()).decode().split("\n")) - {""}
    except (SafetensorError, KeyError, ValueError, RuntimeError):
        return None
    if len(steps) != request.num_images:
        return None
    pictures = [
        Progress(step, tensors[f"latents.{index}"], unproven=unproven)
        if f"latents.{index}" in tensors and 0 < step < request.num_inference_steps
        else Progress()
        for index, step in enumerate(steps)
    ]
    return pictures if any(picture.step for picture in pictures) else None


def can_resume(pipeline: Any, request: ResolvedRequest) -> bool:
    """Whether this pipeline object can continue from latents for this request."""
    return type(pipeline).__name__ in RESUMABLE and request.scheduler == "auto" and not request.controls


def remaining(progress: Progress, request: ResolvedRequest, device: torch.device) -> dict[str, Any]:
    """Call arguments that let the pipeline continue after `progress.step`."""
    assert progress.latents is not None, "restore returns latents"
    steps = request.num_inference_steps
    sigmas = np.linspace(1.0, 1 / steps, steps)[progress.step :]
    return {
        "num_inference_steps": len(sigmas),
        "sigmas": sigmas,
        "latents": progress.latents.to(device),
    }
