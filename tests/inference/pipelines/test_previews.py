"""Previews: the clean latents that a perfect model predicts, for every noise scheduler, and their colours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from deployments.pipelines.noise_schedulers import SCHEDULERS, noise_scheduler
from deployments.pipelines.previews import Previewer, _least_squares, predicted_clean, watch
from tests.inference import tiny
from tests.inference.families import FAMILIES

NOISE_SCHEDULERS = sorted(name for name in SCHEDULERS if not name.startswith("flow"))
FLOW_SCHEDULERS = sorted(name for name in SCHEDULERS if name.startswith("flow"))
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", NOISE_SCHEDULERS)
def test_a_perfect_model_shows_the_clean_picture_at_every_step(name: str, kind: str) -> None:
    own = EulerDiscreteScheduler(**BETAS, prediction_type=kind, timestep_spacing="leading", steps_offset=1)
    scheduler = noise_scheduler(name, own)
    scheduler.set_timesteps(10)
    torch.manual_seed(0)
    clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)

    for timestep in scheduler.timesteps[[0, 4, 8]]:
        whole = timestep.round().long().reshape(1)
        mixed = DDIMScheduler(**BETAS).add_noise(clean, noise, whole)
        alpha = scheduler.alphas_cumprod[int(whole)]
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        sample = mixed / alpha.sqrt() if in_sigma_space(scheduler) else mixed
        output = noise if kind == "epsilon" else velocity
        seen = predicted_clean(scheduler, output, timestep, sample)
        assert seen is not None
        assert torch.allclose(seen, clean, atol=1e-3)


def in_sigma_space(scheduler: Any) -> bool:
    """Samples of these are clean + sigma * noise, so they start with much more than 1."""
    return float(scheduler.init_noise_sigma) > 1.5


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_a_perfect_flow_model_shows_the_clean_picture_at_every_step(name: str) -> None:
    scheduler = noise_scheduler(name, FlowMatchEulerDiscreteScheduler(shift=3.0))
    scheduler.set_timesteps(10)
    clean, noise = torch.randn(1, 16, 8, 8), torch.randn(1, 16, 8, 8)
    sigma = float(scheduler.sigmas[0])

    seen = predicted_clean(scheduler, noise - clean, scheduler.timesteps[0], torch.lerp(clean, noise, sigma))

    assert seen is not None
    assert torch.allclose(seen, clean, atol=1e-3)


def test_channels_that_the_synthetic_pictures_do_not_use_have_no_weight() -> None:
    torch.manual_seed(0)
    moved = torch.randn(200, 3, dtype=torch.float64)
    still = 1e-9 * torch.randn(200, 2, dtype=torch.float64)
    colours = moved @ torch.tensor([[0.5, 0, 0], [0, 0.2, 0], [0, 0, -0.3]], dtype=torch.float64)

    weights = _least_squares(torch.cat([moved, still], 1), colours + 1e-3 * torch.randn(200, 3))

    assert torch.allclose(weights[:3].diagonal(), torch.tensor([0.5, 0.2, -0.3]).double(), atol=0.01)
    assert weights[3:].abs().max() < 1e-3


def test_a_preview_accepts_numbers_that_are_not_finite() -> None:
    previewer = Previewer.fitted_to(tiny.sd())
    assert previewer is not None

    look = previewer.preview(torch.full((4, 8, 6), float("nan")))

    assert look.shape == (8, 6, 3)
    assert look.dtype == np.uint8


@pytest.mark.filterwarnings("default")  # of the libraries, about unusually small sizes
@pytest.mark.parametrize(
    "name", ["FLUX.1-dev", "SDXL", "Stable Diffusion 3", "Qwen-Image", "Wan", "LTX-Video", "HunyuanVideo"]
)
@torch.inference_mode()
def test_every_step_of_a_family_can_be_shown_in_the_shape_of_its_picture(name: str) -> None:
    family, seen = FAMILIES[name], list[torch.Tensor]()
    pipeline = family.build()
    request = {**family.requests()[0], "height": 32, "width": 64}
    previewer = Previewer.fitted_to(pipeline)
    assert previewer is not None
    watch(pipeline, 64, 32, lambda: True, seen.append)
    pipeline.set_progress_bar_config(disable=True)

    pipeline(**request, generator=torch.Generator().manual_seed(0), output_type="latent")

    shapes = {previewer.preview(latents).shape for latents in seen}
    assert len(seen) == request["num_inference_steps"]
    assert len(shapes) == 1
    height, width, colours = shapes.pop()
    assert (width, colours) == (2 * height, 3)


def test_a_pipeline_without_a_picture_vae_has_no_previews() -> None:
    class Bare:
        vae = None

    assert Previewer.fitted_to(Bare()) is None
