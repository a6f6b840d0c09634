"""A pipeline's callback after each step: it counts steps, keeps or restores the state, and finds NaN."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deployments.pipelines.arguments import parameters_of
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
    kind: type = type(pipeline)
    # where latents cannot be given back to the call, it cannot be continued
    takes_latents = "callback_on_step_end" in parameters_of(kind)
    call = record(pipeline, generators, progress) if takes_latents else None
    progress.before, progress.after = before, after
    replay: Replay | None = None
    if progress.saved is not None:
        if call is None:
            raise StateMismatch(f"{type(pipeline).__name__} cannot be continued with these settings")
        replay = Replay(call, progress.saved)

    def at_step_end(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal replay
        own_steps = steps_of(pipe)
        done, steps = before + step + 1, before + own_steps + after
        restored = False
        if replay is not None and progress.saved is not None:
            replay.check(steps)
            restored = done == progress.saved.step
            if done < progress.saved.step:
                if step + 1 == own_steps:
                    replay.end()  # the rest is of another pipeline
                return tensors
            replay.end()
            tensors["latents"] = replay.restore(tensors["latents"].device)
            progress.saved = replay = None
        if step + 1 == own_steps and not after:
            _check_finite(tensors["latents"])
        progress.step, progress.steps, progress.latents, progress.call = done, steps, tensors["latents"], call
        if not restored:
            on_step(done, steps)
        return tensors

    return at_step_end


def call_with_steps(pipeline: Any, arguments: dict[str, Any], at_step_end: Callable[..., Any]) -> Any:
    """The result of the pipeline's call with these arguments, with `at_step_end` called after each step.

    pipeline: a request's own object with a noise scheduler of its own. Where its call takes no
    `callback_on_step_end`, the steps are those of its noise scheduler.
    """
    kind: type = type(pipeline)
    if "callback_on_step_end" in parameters_of(kind):
        return pipeline(**arguments, callback_on_step_end=at_step_end)
    scheduler, done = pipeline.scheduler, itertools.count()
    step = scheduler.step

    @functools.wraps(step)  # pipelines inspect its signature for `eta` and `generator`
    def reporting(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        latents = result[0] if isinstance(result, tuple) else result.prev_sample
        at_step_end(pipeline, next(done), None, {"latents": latents})
        return result

    vars(scheduler)["step"] = reporting
    return pipeline(**arguments)


def steps_of(pipeline: Any) -> int:
    """How often the pipeline's noise scheduler is called, in all, once the call has begun."""
    known = getattr(pipeline, "num_timesteps", None)  # a property of most pipelines
    return len(pipeline.scheduler.timesteps) if known is None else int(known)


def _check_finite(latents: torch.Tensor) -> None:
    if not bool(torch.isfinite(latents).all()):
        raise not_finite("the model", latents.dtype)
