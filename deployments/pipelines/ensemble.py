"""Ensemble of experts of SDXL: the base model runs the first part of the steps, the refiner the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deployments.engine.plain_tensors import have_same_values
from deployments.pipelines.arguments import call_arguments
from deployments.pipelines.guidance import guidance_arguments
from deployments.pipelines.resume import Progress
from deployments.pipelines.step_callback import step_callback
from deployments.protocol.errors import BadRequest, ModelFailed
from deployments.protocol.request import ResolvedRequest


def run(
    base: Any,
    refiner: Any,
    request: ResolvedRequest,
    arguments: dict[str, Any],
    on_step: Callable[[int, int], None],
    progress: Progress,
) -> Any:
    """The refiner's result. The base pipeline's latents are passed to it without decoding.

    base, refiner: the request's own pipelines. arguments: of the call of the base pipeline.
    Raises BadRequest when one of them would have no step to run.
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
    generators = arguments["generator"]
    latents = base(
        **arguments | {"output_type": "latent"},
        denoising_end=start,
        callback_on_step_end=step_callback(base, generators, on_step, progress, after=second),
    ).images
    refining = call_arguments(type(refiner), request, latents, None) | guidance_arguments(refiner, request)
    # the same generators continue: new ones would repeat the noise of the first latents
    # as `latents` too: a tensor that is given as an image is taken for latents only if it has 4 channels
    refining |= {"generator": generators, "output_type": arguments["output_type"], "latents": latents}
    callback = step_callback(refiner, generators, on_step, progress, before=first)
    return refiner(**refining, denoising_start=start, callback_on_step_end=callback)


def check_same_latents(refiner: Any, base: Any) -> None:
    """Raise ModelFailed where the refiner cannot go on from the latents of the base model: another number of
    channels fails in its first step, another scale makes other images without any error."""
    ours, theirs = _latents_of(base), _latents_of(refiner)
    if ours != theirs:
        differing = ", ".join(
            f"{name} {theirs[name]:g} instead of {ours[name]:g}"
            for name in ours
            if ours[name] != theirs[name]
        )
        raise ModelFailed(
            f"the refiner cannot go on from this model's latents: it has {differing}; name a refiner in the "
            "card that was trained on the same latents"
        )


def _latents_of(pipeline: Any) -> dict[str, float]:
    return {
        "latent channels": float(pipeline.unet.config.out_channels),  # those of inpainting have more inputs
        "the VAE's scaling factor": float(pipeline.vae.config.scaling_factor),
        "pixels per latent": float(pipeline.vae_scale_factor),
    }


def share_equal_parts(refiner: Any, base: Any) -> None:
    """Let the refiner use the text encoder and the VAE of the base model where they are equal, which saves
    memory and lets both share forwards."""
    for name, shared in equal_parts(refiner, base).items():
        setattr(refiner, name, shared)


def equal_parts(refiner: Any, base: Any) -> dict[str, nn.Module]:
    """The text encoder and the VAE of the base model, by name, where those of the refiner are equal."""
    found: dict[str, nn.Module] = {}
    for name in ("text_encoder_2", "vae"):
        own, shared = getattr(refiner, name, None), getattr(base, name, None)
        if own is not None and shared is not None and _equal(own, shared):
            found[name] = shared
    return found


def _equal(one: nn.Module, other: nn.Module) -> bool:
    if type(one) is not type(other):
        return False
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(have_same_values(a[name], b[name]) for name in a)


def _steps_before(scheduler: Any, request: ResolvedRequest, start: float) -> int:
    """Number of steps that a pipeline runs with denoising_end."""
    timesteps, cutoff = _timesteps(scheduler, request, start)
    return int((timesteps >= cutoff).sum())


def _steps_after(scheduler: Any, request: ResolvedRequest, start: float) -> int:
    """Number of steps that a pipeline runs with denoising_start."""
    timesteps, cutoff = _timesteps(scheduler, request, start)
    count = int((timesteps < cutoff).sum())
    # a noise scheduler of second order calls the model twice per step: diffusers starts with a whole step
    return count + 1 if scheduler.order == 2 and count % 2 == 0 else count


def _timesteps(scheduler: Any, request: ResolvedRequest, start: float) -> tuple[torch.Tensor, int]:
    probe = copy.deepcopy(scheduler)
    probe.set_timesteps(request.num_inference_steps)
    noise_levels = probe.config.num_train_timesteps
    return probe.timesteps, round(noise_levels - start * noise_levels)
