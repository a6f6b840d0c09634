"""Stopping a denoising loop between two steps and continuing it on another replica.

Possible for pipelines that take latents and the remaining noise levels, with a noise scheduler that keeps no
history: FLUX text-to-image. The picture is bit-equal to that of an uninterrupted run.
"""

from __future__ import annotations

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
    """How far the denoising of a request is; updated by its pipeline call after every step."""

    step: int = 0  # finished steps
    latents: Tensor | None = None  # after that step, as the pipeline packs them; never changed in place
    resumable: bool = False
    # modules whose forwards were shared in batch sizes not proven exact, on this and on earlier replicas
    unproven: frozenset[str] = frozenset()

    def save(self) -> bytes | None:
        """The state for `restore`; None before the first step and for pipelines that cannot be resumed."""
        if not self.resumable or self.latents is None:
            return None
        unproven = torch.tensor(list("\n".join(sorted(self.unproven)).encode()), dtype=torch.uint8)
        latents = self.latents.detach().cpu().contiguous()
        return bytes_of({"latents": latents, "step": torch.tensor(self.step), "unproven": unproven})


def restore(state: bytes, request: ResolvedRequest) -> Progress | None:
    """The progress from the bytes of `save`; None if it does not match the request, which then restarts."""
    try:
        tensors = tensors_of(state)
        latents, step = tensors["latents"], int(tensors["step"])
        unproven = frozenset(bytes(tensors["unproven"].tolist()).decode().split("\n")) - {""}
    except (SafetensorError, KeyError, ValueError, RuntimeError):
        return None
    matches = 0 < step < request.num_inference_steps and latents.shape[0] == request.num_images
    return Progress(step, latents, unproven=unproven) if matches else None


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
