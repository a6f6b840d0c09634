"""A pipeline's callback after each step: it counts steps, keeps or restores the state, and finds NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from deployments.pipelines.finite import not_finite
from deployments.pipelines.replay import Replay, StateMismatch, record
from deployments.pipelines.resume import Progress

Callback = Callable[..., dict[str, Any]]


def step_callback(
    pipeline: Any,
    generators: Sequence[torch.Generator],
    on_step: Callable[[int, int], None],
    progress: Progress,
    *,
    before: int = 0,
    after: int = 0,
) -> Callback:
    """A function for `callback_on_step_end` of the pipeline's next call, which updates `progress` and calls
    `on_step`. Call it inside the request's fiber.

    generators: of the call. on_step: called with finished steps and all steps.
    before, after: steps of another pipeline before and after this one.
    If `progress` has a saved state, the call passes its steps at once, without `on_step`, and goes on from
    it. Raises StateMismatch when that cannot be, in the call or at once.
    The function raises NotFinite when the latents are not finite after the last step of all.
    """
    call = record(pipeline, generators, progress)
    progress.before, progress.after = before, after
    replay: Replay | None = None
    if progress.saved is not None:
        if call is None:
            raise StateMismatch(f"{type(pipeline).__name__} cannot be continued with these settings")
        replay = Replay(call, progress.saved)

    def at_step_end(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal replay
        done, steps = before + step + 1, before + pipe.num_timesteps + after
        restored = False
        if replay is not None and progress.saved is not None:
            replay.check(steps)
            restored = done == progress.saved.step
            if done < progress.saved.step:
                if step + 1 == pipe.num_timesteps:
                    replay.end()  # the rest is of another pipeline
                return tensors
            replay.end()
            tensors["latents"] = replay.restore()
            progress.saved = replay = None
        if step + 1 == pipe.num_timesteps and not after:
            _check_finite(tensors["latents"])
        progress.step, progress.steps, progress.latents, progress.call = done, steps, tensors["latents"], call
        if not restored:
            on_step(done, steps)
        return tensors

    return at_step_end


def _check_finite(latents: torch.Tensor) -> None:
    if not bool(torch.isfinite(latents).all()):
        raise not_finite("the model", latents.dtype)
