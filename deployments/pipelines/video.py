"""Video pipelines: their class for a task, and their frames, decoded bit by bit where the VAE lets us."""

from __future__ import annotations

from typing import Any, Protocol

import diffusers
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deployments.protocol.errors import ModelUnavailable
from deployments.protocol.request import Task

Frames = npt.NDArray[np.uint8]  # (n, H, W, 3)
CHUNK_FRAMES = 8  # of a video that its VAE gives as a whole
# Causal VAEs whose decoder takes one latent after the other and keeps what it needs of the past
STREAMING_VAES = frozenset({"AutoencoderKLWan"})


class Reel(Protocol):
    """A video that is denoised. `take` is called by one thread at a time, not the engine's."""

    total: int  # frames

    def take(self) -> Frames | None:
        """The next frames; None after the last."""


def video_class(pipeline_class: type, task: Task) -> type:
    """The pipeline of diffusers that does `task` with this one's components.

    Raises ModelUnavailable when diffusers has none.
    """
    name = pipeline_class.__name__
    is_i2v = "ImageToVideo" in name
    if is_i2v is (task is Task.i2v):
        return pipeline_class
    sibling = name.replace("ImageToVideo", "") if is_i2v else name.replace("Pipeline", "ImageToVideoPipeline")
    found = getattr(diffusers, sibling, None)
    if not isinstance(found, type):
        raise ModelUnavailable(f"diffusers has no {sibling}; take {task.value} out of the card's tasks")
    return found


def output_type(pipeline: Any) -> str:
    """What to ask the pipeline for, so that `reel` can make frames of it."""
    return "latent" if _streams(pipeline) else "pt"


def reel(pipeline: Any, output: Tensor) -> Reel:
    """The frames of what the pipeline gave; call it in the fiber, on the engine's thread and stream.

    output: latents (1, C, F, h, w), or frames (1, F, 3, H, W) in 0..1.
    """
    if not _streams(pipeline):
        return _WholeReel(_pixels(output[0]))
    return _LatentReel(pipeline.vae, output)


def _streams(pipeline: Any) -> bool:
    vae = pipeline.vae
    return type(vae).__name__ in STREAMING_VAES and not vae.use_tiling and not vae.use_slicing


class _WholeReel:
    """Frames that were decoded all at once, as uint8."""

    def __init__(self, frames: Frames) -> None:
        self.total = len(frames)
        self._frames = frames
        self._taken = 0

    def take(self) -> Frames | None:
        chunk = self._frames[self._taken : self._taken + CHUNK_FRAMES]
        self._taken += len(chunk)
        return chunk if len(chunk) else None


class _LatentReel:
    """Decodes latents of Wan's VAE one by one, with a feature cache of its own: the same bits as
    `vae.decode` of all at once, which does the same and joins the frames.

    The cache on the VAE itself is left to whoever encodes pictures meanwhile.
    """

    def __init__(self, vae: Any, latents: Tensor) -> None:
        self._vae = vae
        self._place = 0
        convolutions = sum(type(m).__name__ == "WanCausalConv3d" for m in vae.decoder.modules())
        self._cache: list[Any] = [None] * convolutions
        latents = latents.to(vae.dtype)
        shape = (1, vae.config.z_dim, 1, 1, 1)
        mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents.device, latents.dtype)
        spread = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents.device, latents.dtype)
        self._latents: Tensor = vae.post_quant_conv(latents / spread + mean)
        self.total = 1 + vae.config.scale_factor_temporal * (latents.shape[2] - 1)
        self._stream = None
        if latents.is_cuda:  # decoding runs beside the steps of others
            self._stream = torch.cuda.Stream(latents.device)
            self._stream.wait_stream(torch.cuda.current_stream(latents.device))
            self._latents.record_stream(self._stream)

    @torch.inference_mode()
    def take(self) -> Frames | None:
        if self._place == self._latents.shape[2]:
            self._cache.clear()
            return None
        with torch.cuda.stream(self._stream):
            latent = self._latents[:, :, self._place : self._place + 1]
            decoded = self._vae.decoder(
                latent, feat_cache=self._cache, feat_idx=[0], first_chunk=self._place == 0
            )
            self._place += 1
            patch = self._vae.config.patch_size
            if patch is not None:
                decoded = _unpatchify(decoded, patch)
            video = decoded.clamp(-1.0, 1.0)[0].permute(1, 0, 2, 3)  # (F, 3, H, W)
            return _pixels((video * 0.5 + 0.5).clamp(0, 1))


def _pixels(video: Tensor) -> Frames:
    """(F, 3, H, W) in 0..1 as uint8 (F, H, W, 3), rounded as diffusers rounds."""
    return np.asarray((video.float() * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy())


def _unpatchify(decoded: Tensor, size: int) -> Tensor:
    """(B, C x size x size, F, H, W) to (B, C, F, H x size, W x size), as Wan 2.2's VAE folds its pixels."""
    batch, channels, frames, height, width = decoded.shape
    colours = channels // size**2
    folded = decoded.view(batch, colours, size, size, frames, height, width)
    unfolded = folded.permute(0, 1, 4, 5, 3, 6, 2)  # (B, C, F, H, size, W, size)
    return unfolded.reshape(batch, colours, frames, height * size, width * size)
