"""A pipeline's callback after each step: counts steps, keeps the latents, checks the last ones for NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deployments.pipelines.finite import not_finite
from deployments.pipelines.resume import Progress


def step_callback(
    on_step: Callable[[int, int], None], progress: Progress, *, after: int = 0
) -> Callable[..., dict[str, Any]]:
    """A function for `callback_on_step_end`, which updates `progress` and calls `on_step`.

    on_step: called with finished steps and all steps. after: steps of another pipeline after this one.
    The function raises NotFinite when the latents are not finite after the last step of all.
    """
    before = progress.before = progress.step
    progress.after = after

    def at_step_end(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        last = step + 1 == pipe.num_timesteps
        if last and not after:
            _check_finite(tensors["latents"])
        progress.step, progress.latents = before + step + 1, tensors["latents"]
        on_step(progress.step, before + pipe.num_timesteps + after)
        return tensors

    return at_step_end


def _check_finite(latents: torch.Tensor) -> None:
    if not bool(torch.isfinite(latents).all()):
        raise not_finite("the model", latents.dtype)
