"""Previews of unfinished pictures and videos: the clean latents that the model predicts, mapped to colours.

The map is fitted to the model's own VAE when it is loaded: the colour of each latent is a weighted sum of its
channels. That costs a matrix product of 17 x 3, where a decoder would cost about as much as a step.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from deployments.pipelines.host_timesteps import on_host

logger = logging.getLogger(__name__)

PreviewPixels = npt.NDArray[np.uint8]  # (H, W, 3), one pixel per latent
FIT_PICTURES, FIT_LATENTS = 8, 16  # pictures of 16 x 16 latents: 2,048 samples for 17 weights
FIT_VIDEOS = 4  # they take longer
RIDGE = 1e-3  # of a channel's mean square
# noise schedulers whose samples are clean + sigma * noise; those of the others have variance 1
SIGMA_SPACE = frozenset(
    """
    EulerDiscreteScheduler EulerAncestralDiscreteScheduler HeunDiscreteScheduler LMSDiscreteScheduler
    KDPM2DiscreteScheduler KDPM2AncestralDiscreteScheduler DPMSolverSDEScheduler
    """.split()
)


# By VAE, the frames of the synthetic videos, of which the last latent is taken: the first latent of a video
# has one frame, and the others, with several, map to other colours. None: the VAE encodes pictures.
FIT_FRAMES = {
    "AutoencoderKL": None,
    "AutoencoderTiny": None,
    "AutoencoderKLQwenImage": 1,
    "AutoencoderKLWan": 5,
    "AutoencoderKLHunyuanVideo": 5,
    "AutoencoderKLLTXVideo": 9,
}


class Previewer:
    """Maps latents of one model to small pictures."""

    def __init__(self, weights: Tensor) -> None:
        """weights: (channels + 1, 3), the last row is the constant; colours are -1..1."""
        self._weights = weights

    @classmethod
    @torch.inference_mode()
    def fitted_to(cls, pipeline: Any) -> Previewer | None:
        """Fit by least squares over synthetic pictures; None for a VAE of another kind."""
        vae = getattr(pipeline, "vae", None)
        kind = type(vae).__name__
        if vae is None or kind not in FIT_FRAMES:
            return None
        frames = FIT_FRAMES[kind]
        side = FIT_LATENTS * _pixels_per_latent(vae)
        pictures = _synthetic_pictures(FIT_PICTURES if frames is None else FIT_VIDEOS, side)
        if frames is None:
            latents = _encoded(vae, pictures)
        else:  # one by one: all at once would take as much memory as a long video
            videos = (picture.view(1, 3, 1, side, side).repeat(1, 1, frames, 1, 1) for picture in pictures)
            latents = torch.cat([_encoded(vae, video)[:, :, -1] for video in videos])
        scale = side // FIT_LATENTS
        samples = latents.permute(0, 2, 3, 1).flatten(0, 2)
        colours = functional.avg_pool2d(pictures, scale).permute(0, 2, 3, 1).flatten(0, 2)
        with_constant = torch.cat([samples, torch.ones(len(samples), 1)], 1)
        return cls(_least_squares(with_constant.double(), colours.double()).float())

    def preview(self, latents: Tensor) -> PreviewPixels:
        """The picture of latents (C, H, W) on the host in the pipeline's scale, finite or not."""
        flat = latents.float().permute(1, 2, 0)  # (H, W, C)
        colours = flat @ self._weights[:-1] + self._weights[-1]
        return np.asarray(((colours.nan_to_num() + 1) * 127.5).clamp(0, 255).byte().numpy())


def _pixels_per_latent(vae: Any) -> int:
    """On each side of a picture."""
    known = getattr(vae, "spatial_compression_ratio", None)
    return int(known) if known else int(2 ** (len(vae.config.block_out_channels) - 1))


def _encoded(vae: Any, pictures: Tensor) -> Tensor:
    """Latents of pictures (n, 3, H, W) or videos (n, 3, frames, H, W) on the host, as a pipeline has them."""
    encoded = vae.encode(pictures.to(vae.device, vae.dtype))
    latents: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return _as_denoised(latents.float().cpu(), vae)


def _as_denoised(latents: Tensor, vae: Any) -> Tensor:
    """Latents (n, C, ...) of the VAE in the pipeline's scale."""
    known = dict(vae.config) | dict(vae.named_buffers(recurse=False))  # LTX-Video's statistics are buffers
    scaling = known.get("scaling_factor") or 1.0
    if known.get("latents_mean") is None:
        return (latents - (known.get("shift_factor") or 0.0)) * scaling
    shape = (1, -1, *[1] * (latents.ndim - 2))
    mean, std = (
        torch.as_tensor(known[name], dtype=torch.float32).cpu().view(shape)
        for name in ("latents_mean", "latents_std")
    )
    return (latents - mean) * scaling / std


def _least_squares(samples: Tensor, colours: Tensor) -> Tensor:
    """Weights (channels, 3) of samples (n, channels) for colours (n, 3), with a small ridge.

    Without it, channels that the synthetic pictures do not use would get arbitrarily large weights.
    """
    gram = samples.T @ samples
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weights: Tensor = torch.linalg.solve(gram + ridge, samples.T @ colours)
    return weights


def watch(
    pipeline: Any, width: int, height: int, wanted: Callable[[], bool], show: Callable[[Tensor], None]
) -> None:
    """Have `show` called with the predicted clean latents (C, H, W) of the first picture; of a video, of the
    frame in its middle.

    pipeline: a request's own object with a noise scheduler of its own; width, height: in pixels.
    wanted: called at every step of the noise scheduler; `show` is called for True.
    """
    scheduler = pipeline.scheduler
    step = scheduler.step

    @functools.wraps(step)  # pipelines inspect its signature for `eta` and `generator`
    def watched(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if wanted():
            clean = predicted_clean(scheduler, model_output[:1], timestep, sample[:1])
            if clean is not None and (unpacked := _unpacked(pipeline, clean, width, height)) is not None:
                show(unpacked)
        return step(model_output, timestep, sample, *args, **kwargs)

    vars(scheduler)["step"] = watched


def predicted_clean(scheduler: Any, output: Tensor, timestep: Any, sample: Tensor) -> Tensor | None:
    """The finished latents that the model predicts by its output for `sample` at `timestep`.

    None for a noise scheduler whose arithmetic is not implemented here.
    """
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if "FlowMatch" in type(scheduler).__name__ or kind == "flow_prediction":
        return sample - _sigma_now(scheduler, timestep) * output
    if kind == "sample":
        return output
    if not hasattr(scheduler, "alphas_cumprod"):
        return None
    last = len(scheduler.alphas_cumprod) - 1
    place = round(float(on_host(scheduler, timestep)))
    alpha = float(scheduler.alphas_cumprod[min(last, max(0, place))])
    signal, noise = alpha**0.5, (1 - alpha) ** 0.5
    if type(scheduler).__name__ in SIGMA_SPACE:
        sample = sample * signal
    clean: Tensor | None = None
    if kind == "epsilon":
        clean = (sample - noise * output) / signal
    elif kind == "v_prediction":
        clean = signal * sample - noise * output
    return clean


def _sigma_now(scheduler: Any, timestep: Any) -> Tensor:
    index = scheduler.step_index
    if index is None:
        index = scheduler.index_for_timestep(timestep)
    sigma: Tensor = scheduler.sigmas[index]
    return sigma


def _unpacked(pipeline: Any, latents: Tensor, width: int, height: int) -> Tensor | None:
    """Latents (C, H, W) from those of a picture or a video, or from tokens as FLUX or LTX pack them; None for
    other shapes."""
    if latents.ndim == 3 and hasattr(pipeline, "_unpack_latents"):
        unpack = pipeline._unpack_latents  # noqa: SLF001  no public name
        if "num_frames" in inspect.signature(unpack).parameters:
            ratio, patch, patch_t = (
                pipeline.vae_spatial_compression_ratio,
                pipeline.transformer_spatial_patch_size,
                pipeline.transformer_temporal_patch_size,
            )
            height, width = height // ratio, width // ratio
            num_frames = latents.shape[1] * patch * patch * patch_t // (height * width)
            latents = unpack(latents, num_frames, height, width, patch, patch_t)
        else:
            latents = unpack(latents, height, width, pipeline.vae_scale_factor)
    if latents.ndim == 5:
        latents = latents[:, :, latents.shape[2] // 2]
    return latents[0] if latents.ndim == 4 else None


def _synthetic_pictures(count: int, side: int) -> Tensor:
    """(count, 3, side, side) in -1..1: flat patches and gradients of random colours."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1
    flat = functional.interpolate(patches, size=(side, side), mode="nearest")
    slopes = functional.interpolate(patches.flip(0), size=(side, side), mode="bilinear")
    share = torch.linspace(0, 1, count).view(-1, 1, 1, 1)
    return torch.lerp(flat, slopes, share)
