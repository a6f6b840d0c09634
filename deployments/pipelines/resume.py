"""A denoising loop stopped between two steps, and the same loop gone on with elsewhere.

Possible where a pipeline takes latents and the noise levels that are left, and its noise scheduler keeps no
history: FLUX text-to-image. The finished picture has the bits of an uninterrupted run.
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
    """How far a request's denoising is; its pipeline call keeps it up to date."""

    step: int = 0  # steps done
    latents: Tensor | None = None  # after that step, as the pipeline packs them; never changed in place
    resumable: bool = False

    def save(self) -> bytes | None:
        """For `restore`; None where nothing is done yet or the pipeline cannot go on from there."""
        if not self.resumable or self.latents is None:
            return None
        step = torch.tensor(self.step)
        return bytes_of({"latents": self.latents.detach().cpu().contiguous(), "step": step})


def restore(state: bytes, request: ResolvedRequest) -> Progress | None:
    """What `save` gave; None if it does not fit the request, which then starts anew."""
    try:
        tensors = tensors_of(state)
        latents, step = tensors["latents"], int(tensors["step"])
    except (SafetensorError, KeyError, ValueError, RuntimeError):
        return None
    fits = 0 < step < request.num_inference_steps and latents.shape[0] == request.num_images
    return Progress(step, latents) if fits else None


def can_resume(pipeline: Any, request: ResolvedRequest) -> bool:
    """Whether this pipeline object can go on from latents for this request."""
    return type(pipeline).__name__ in RESUMABLE and request.scheduler == "auto" and not request.controls


def remaining(progress: Progress, request: ResolvedRequest, device: torch.device) -> dict[str, Any]:
    """Call arguments that make the pipeline go on after `progress.step`."""
    assert progress.latents is not None, "restore gives latents"
    steps = request.num_inference_steps
    sigmas = np.linspace(1.0, 1 / steps, steps)[progress.step :]
    return {
        "num_inference_steps": len(sigmas),
        "sigmas": sigmas,
        "latents": progress.latents.to(device),
    }
