"""SDXL's ensemble of experts: the base model makes the first part of the steps, the refiner the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deployments.pipelines.arguments import call_arguments
from deployments.pipelines.resume import Progress
from deployments.pipelines.step_callback import step_callback
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import ResolvedRequest


def run(
    base: Any,
    refiner: Any,
    request: ResolvedRequest,
    arguments: dict[str, Any],
    on_step: Callable[[int, int], None],
    progress: Progress,
) -> Any:
    """The refiner's answer. Latents go from one pipeline to the other; nothing is decoded in between.

    base, refiner: the request's own pipelines. arguments: those of the base's call.
    Raises BadRequest when one of both would have no step to run.
    """
    start = request.refiner
    assert start is not None, "the request asks for the refiner"
    first, second = (
        _steps_before(base.scheduler, request, start),
        _steps_after(refiner.scheduler, request, start),
    )
    if not first or not second:
        idle = "the model" if not first else "the refiner"
        raise BadRequest(
            f"with refiner {start:g}, {request.num_inference_steps} steps leave none for {idle}; "
            "use more steps, or another number for refiner",
            param="refiner",
        )
    latents = base(
        **arguments | {"output_type": "latent"},
        denoising_end=start,
        callback_on_step_end=step_callback(on_step, progress, after=second),
    ).images
    refining = call_arguments(type(refiner), request, latents, None)
    # the same generators go on: fresh ones would give the noise of the first latents again
    refining |= {"generator": arguments["generator"], "output_type": arguments["output_type"]}
    return refiner(**refining, denoising_start=start, callback_on_step_end=step_callback(on_step, progress))


def share_equal_parts(refiner: Any, base: Any) -> None:
    """Give the refiner the base's own text encoder and VAE where its copies are equal, to save memory
    and let both share forwards."""
    for name in ("text_encoder_2", "vae"):
        mine, others = getattr(refiner, name, None), getattr(base, name, None)
        if mine is not None and others is not None and _equal(mine, others):
            setattr(refiner, name, others)


def _equal(one: nn.Module, other: nn.Module) -> bool:
    if type(one) is not type(other):
        return False
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(
        mine[name].dtype == others[name].dtype and torch.equal(mine[name], others[name]) for name in mine
    )


def _steps_before(scheduler: Any, request: ResolvedRequest, start: float) -> int:
    """Steps that a pipeline runs with denoising_end."""
    timesteps, cutoff = _timesteps(scheduler, request, start)
    return int((timesteps >= cutoff).sum())


def _steps_after(scheduler: Any, request: ResolvedRequest, start: float) -> int:
    """Steps that a pipeline runs with denoising_start."""
    timesteps, cutoff = _timesteps(scheduler, request, start)
    count = int((timesteps < cutoff).sum())
    # a scheduler of second order calls the model twice per step: diffusers begins with a whole one
    return count + 1 if scheduler.order == 2 and count % 2 == 0 else count


def _timesteps(scheduler: Any, request: ResolvedRequest, start: float) -> tuple[torch.Tensor, int]:
    probe = copy.deepcopy(scheduler)
    probe.set_timesteps(request.num_inference_steps)
    noise_levels = probe.config.num_train_timesteps
    return probe.timesteps, round(noise_levels - start * noise_levels)
