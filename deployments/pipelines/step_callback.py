"""A pipeline's callback at the end of each step: counts, keeps the latents, looks at the last ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deployments.pipelines.resume import Progress
from deployments.protocol.errors import NotFinite


def step_callback(
    on_step: Callable[[int, int], None], progress: Progress, *, after: int = 0
) -> Callable[..., dict[str, Any]]:
    """For `callback_on_step_end`. Steps count on from those that `progress` has done.

    after: steps that another pipeline will run after this one.
    """
    before = progress.step

    def at_step_end(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        last = step + 1 == pipe.num_timesteps
        if last and not after:
            _check(tensors["latents"])
        progress.step, progress.latents = before + step + 1, tensors["latents"]
        on_step(progress.step, before + pipe.num_timesteps + after)
        return tensors

    return at_step_end


def _check(latents: torch.Tensor) -> None:
    if not bool(torch.isfinite(latents).all()):
        raise NotFinite(
            "the model gave numbers that are not finite (NaN), so the picture would be black; "
            "another seed, less guidance or a card with dtype float32 may help"
        )
