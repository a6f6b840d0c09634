"""Video pipelines: their class for a task, and their frames, decoded in parts where the VAE allows it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import diffusers
import numpy as np
import torch
from torch import Tensor

from deployments.media.video_spec import Frames, Sound
from deployments.pipelines.arguments import parameters_of
from deployments.pipelines.finite import check_finite_pixels
from deployments.protocol.errors import ModelFailed, NotFinite
from deployments.protocol.request import Task

CHUNK_FRAMES = 8  # frames per call of a video that its pipeline decoded as a whole


class LatentDecoder(Protocol):
    """The frames of a denoised video. `next_frames` is called on one thread at a time, always on the same
    stream, which is not the engine's. It raises NotFinite where the VAE's pixels are no numbers."""

    total: int  # frames
    sound: DeviceSound | None  # what the model made with them

    def next_frames(self) -> Frames | None:
        """The next frames (n, H, W, 3); None after the last. A call that failed may be repeated."""


def video_class(pipeline_class: type, task: Task) -> type:
    """The pipeline of diffusers for `task` with the components of this one.

    Raises ModelFailed when diffusers has none.
    """
    name = pipeline_class.__name__
    is_i2v = "ImageToVideo" in name
    if is_i2v is (task is Task.i2v):
        return pipeline_class
    sibling = name.replace("ImageToVideo", "") if is_i2v else name.replace("Pipeline", "ImageToVideoPipeline")
    found = getattr(diffusers, sibling, None)
    if not isinstance(found, type):
        known = parameters_of(pipeline_class)
        if task is Task.i2v and {"image", "conditions"} & known:  # one class for both, as Kandinsky 6
            return pipeline_class
        raise ModelFailed(f"diffusers has no {sibling}; take {task.value} out of the card's tasks")
    return found


def requested_frames(pipeline: Any, frames: int) -> int:
    """The num_frames with which the pipeline returns so many.

    The first image-to-video model of HunyuanVideo places the picture before its frames, and the pipeline
    removes that latent.
    """
    return frames + pipeline.vae.temporal_compression_ratio if _cuts_first_latent(pipeline) else frames


def output_type(pipeline: Any) -> str:
    """The output_type with which the pipeline must be called, so that `latent_decoder` can use its result."""
    return "pt" if _streaming_decoder(pipeline) is None else "latent"


def sound_of(pipeline: Any, output: Any) -> DeviceSound | None:
    """The sound of a pipeline's output that has `audio` (1, channels, n) beside its frames; None without."""
    audio = getattr(output, "audio", None)
    if audio is None:
        return None
    return DeviceSound(audio[0], int(pipeline.vocoder.config.output_sampling_rate))


def latent_decoder(pipeline: Any, output: Tensor) -> LatentDecoder:
    """The decoder for a pipeline's result; call it in the fiber, on the engine's thread and stream.

    output: latents (1, C, F, h, w), or frames (1, F, 3, H, W) in 0..1.
    """
    streaming = _streaming_decoder(pipeline)
    return _DecodedFrames(output[0]) if streaming is None else streaming(pipeline.vae, output)


def _streaming_decoder(pipeline: Any) -> Callable[[Any, Tensor], LatentDecoder] | None:
    """The decoder in parts that is bit-equal to the VAE's own decoding; None if there is none."""
    vae = pipeline.vae
    # tiles are decoded through all frames; weights that move are there for a call of the whole VAE
    if getattr(vae, "use_tiling", False) or hasattr(vae, "_hf_hook"):
        return None
    match type(vae).__name__:
        case "AutoencoderKLWan":
            return _CausalDecoder
        case "AutoencoderKLHunyuanVideo" if vae.use_framewise_decoding and not _cuts_first_latent(pipeline):
            return _OverlappingDecoder
        case _:
            return None


def _cuts_first_latent(pipeline: Any) -> bool:
    return (
        type(pipeline).__name__ == "HunyuanVideoImageToVideoPipeline"
        and pipeline.transformer.config.image_condition_type == "latent_concat"
    )


class _FromEngine:
    """A tensor that the engine's stream computes and the stream of `next_frames` uses."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._computed = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def here(self) -> Tensor:
        """The tensor, for work on the current stream."""
        if self._computed is not None:
            stream = torch.cuda.current_stream(self._tensor.device)
            stream.wait_event(self._computed)
            self._tensor.record_stream(stream)
            self._computed = None
        return self._tensor


class DeviceSound:
    """Samples that the engine's stream computes."""

    def __init__(self, samples: Tensor, rate: int) -> None:
        """samples: (channels, n) in -1..1. rate: samples per second."""
        self._samples = _FromEngine(samples)
        self._rate = rate

    @torch.inference_mode()
    def here(self) -> Sound:
        """The samples in memory. Blocks; call it on the stream of `next_frames`.

        Raises NotFinite for samples that are no numbers.
        """
        samples = self._samples.here().float()
        if not bool(torch.isfinite(samples).all()):
            raise NotFinite(
                "the sound has numbers that are not finite (NaN), so it cannot be heard; another seed or "
                "weights.dtype float32 in the card may help, and sound: false leaves it out"
            )
        return Sound(samples.clamp(-1.0, 1.0).cpu().numpy(), self._rate)


class _DecodedFrames:
    """Frames that the pipeline decoded as a whole."""

    def __init__(self, video: Tensor) -> None:
        """video: (F, 3, H, W) in 0..1."""
        self.total = len(video)
        self.sound: DeviceSound | None = None
        self._video = _FromEngine(video)
        self._returned = 0

    @torch.inference_mode()
    def next_frames(self) -> Frames | None:
        chunk = self._video.here()[self._returned : self._returned + CHUNK_FRAMES]
        frames = _pixels(chunk) if len(chunk) else None
        self._returned += len(chunk)
        return frames


class _StreamingDecoder(ABC):
    """Decodes latents in parts, parallel to the steps of other requests."""

    def __init__(self, vae: Any, latents: Tensor, total: int) -> None:
        """latents: (1, C, F, h, w), scaled as the decoder expects them. total: frames of the video."""
        self.total = total
        self.sound: DeviceSound | None = None
        self._vae = vae
        self._from_engine = _FromEngine(latents)
        self._position = 0
        self._kept: Any = None

    @property
    def _latents(self) -> Tensor:
        return self._from_engine.here()

    @torch.inference_mode()
    def next_frames(self) -> Frames | None:
        while self._position < self._latents.shape[2]:
            decoded, position, kept = self._next()
            frames = None
            if decoded.shape[2]:
                video = decoded.clamp(-1.0, 1.0)[0].permute(1, 0, 2, 3)  # (F, 3, H, W)
                frames = _pixels((video * 0.5 + 0.5).clamp(0, 1))
            self._position, self._kept = position, kept  # only now: a call that failed can be repeated
            if frames is not None:
                return frames
        self._kept = None
        return None

    @abstractmethod
    def _next(self) -> tuple[Tensor, int, Any]:
        """Decode from self._position with what self._kept has of earlier parts, and change neither.

        Returns (1, 3, frames, H, W), frames may be 0; then the position and what to keep for the next part.
        """


class _CausalDecoder(_StreamingDecoder):
    """Decodes latents of Wan's VAE one by one, with a feature cache of its own. Bit-equal to `vae.decode`,
    which does the same and joins the frames.

    The cache in the VAE itself is not used, because other requests encode pictures with it meanwhile.
    """

    def __init__(self, vae: Any, latents: Tensor) -> None:
        convolutions = sum(type(m).__name__ == "WanCausalConv3d" for m in vae.decoder.modules())
        latents = latents.to(vae.dtype)
        shape = (1, vae.config.z_dim, 1, 1, 1)
        mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents.device, latents.dtype)
        inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents.device, latents.dtype)
        frames = 1 + vae.config.scale_factor_temporal * (latents.shape[2] - 1)
        super().__init__(vae, vae.post_quant_conv(latents / inverse_std + mean), frames)
        self._kept = [None] * convolutions

    def _next(self) -> tuple[Tensor, int, Any]:
        latent, cache = self._latents[:, :, self._position : self._position + 1], list(self._kept)
        decoded: Tensor = self._vae.decoder(
            latent, feat_cache=cache, feat_idx=[0], first_chunk=self._position == 0
        )
        patch = self._vae.config.patch_size
        return decoded if patch is None else _unpatchify(decoded, patch), self._position + 1, cache


class _OverlappingDecoder(_StreamingDecoder):
    """Decodes latents of HunyuanVideo in parts that overlap and are blended. Bit-equal to `vae.decode`, which
    decodes all parts in this way and then joins them.
    """

    def __init__(self, vae: Any, latents: Tensor) -> None:
        frames = 1 + vae.temporal_compression_ratio * (latents.shape[2] - 1)
        super().__init__(vae, latents.to(vae.dtype) / vae.config.scaling_factor, frames)

    def _next(self) -> tuple[Tensor, int, Any]:
        vae, count = self._vae, self._latents.shape[2]
        length = vae.tile_sample_min_num_frames // vae.temporal_compression_ratio
        stride = vae.tile_sample_stride_num_frames // vae.temporal_compression_ratio
        if count <= length:
            return vae.decoder(vae.post_quant_conv(self._latents)), count, None
        part = self._latents[:, :, self._position : self._position + length + 1]
        decoded = vae.decoder(vae.post_quant_conv(part))
        shown = vae.tile_sample_stride_num_frames
        if self._kept is None:
            shown += 1
        else:  # the first latent of a part only gives context
            overlap = vae.tile_sample_min_num_frames - vae.tile_sample_stride_num_frames
            decoded = vae.blend_t(self._kept, decoded[:, :, 1:], overlap)
        return decoded[:, :, :shown], self._position + stride, decoded


def _pixels(video: Tensor) -> Frames:
    """(F, 3, H, W) in 0..1 as uint8 (F, H, W, 3), rounded as diffusers rounds.

    Raises NotFinite for pixels that are no numbers.
    """
    check_finite_pixels(video)
    return np.asarray((video.float() * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy())


def _unpatchify(decoded: Tensor, size: int) -> Tensor:
    """(B, C x size x size, F, H, W) to (B, C, F, H x size, W x size), as the VAE of Wan 2.2 folds pixels."""
    batch, channels, frames, height, width = decoded.shape
    colours = channels // size**2
    folded = decoded.view(batch, colours, size, size, frames, height, width)
    unfolded = folded.permute(0, 1, 4, 5, 3, 6, 2)  # (B, C, F, H, size, W, size)
    return unfolded.reshape(batch, colours, frames, height * size, width * size)
