"""The video autoencoder: an encoder that is computed (a PCA of 4 x 8 x 8 blocks), a decoder that is trained.

AutoencoderKLWan keeps the first frame by itself and folds every four frames that follow: 17 frames of 64 x 64
px become 5 x 8 x 8 latents of 16 channels.  As in autoencoder.py, the encoder's strided convolutions
fold and project, all else in it passes values on; its norms divide by a sum of squares that two constant
channels dominate.  The decoder starts as "the mean colour of each 8 x 8 block in each frame" and learns the
rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]  # it ships no types

from tools.tiny_models.learner import Learner, learning_rate
from tools.tiny_models.video_scenes import FRAMES, VIDEO_PX, Frames, draw_clip, render_clip

VideoAutoencoder = Any  # AutoencoderKLWan; diffusers declares its models without members

LATENT_CHANNELS = 16
LATENT_FRAMES = 1 + (FRAMES - 1) // 4
LATENT_PX = VIDEO_PX // 8
PATCH_PX = 2  # folded into channels before the first convolution: a quarter of the work
WIDTHS = (32, 64, 48)
NARROW, WIDE = 32, 64  # components kept by the first and the second folding
PIN = 100.0  # two constant channels of +-100 fix the sum of squares that a norm divides by
AUTOENCODER_SEED = 10_000_000


def build_autoencoder() -> VideoAutoencoder:
    """Wan's geometry (8 x 8 px, 4 frames, 16 channels) at a thousandth of its size."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[width // 16 for width in WIDTHS],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        in_channels=3 * PATCH_PX**2,
        out_channels=3 * PATCH_PX**2,
        patch_size=PATCH_PX,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )


def pixels(clips: list[Frames]) -> Tensor:
    """(B, 3, frames, H, W) in -1..1 of RGB frames (frames, H, W, 3)."""
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


# --- the computed encoder ---------------------------------------------------------------------------------


@torch.no_grad()
def fold_into_encoder(vae: VideoAutoencoder, videos: Tensor) -> Tensor:
    """Set the encoder to the PCA of these videos; gives back their latents, std 1.

    videos: (B, 3, 17, 64, 64) in -1..1.  Returns (B, 16, 5, 8, 8).

    Components are scaled by std^-0.5: half way between keeping their energy and whitening them.
    """
    x = patchify(videos, PATCH_PX)  # (B, 12, 17, 32, 32)
    first_space = _principal([_folded_space(x)], NARROW)  # (48, 32)
    x = _mapped(_folded_space(x), first_space)
    first_time = _principal([_folded_time(x)], NARROW)  # (64, 32)
    x = torch.cat([x[:, :, :1], _mapped(_folded_time(x), first_time)], 2)  # (B, 32, 9, 16, 16)
    x = _folded_space(x)  # (B, 128, 9, 8, 8)
    both_kinds = _principal([x[:, :, :1], x[:, :, 1:]], WIDE)  # of first frames and of pairs of frames
    image = _principal([_mapped(x[:, :, :1], both_kinds)], WIDE)  # (64, 64): first frames' own axes in front
    image_gain, image_mean = _gain(_mapped(x[:, :, :1], both_kinds @ image[:, :LATENT_CHANNELS]))
    second_space = both_kinds @ image
    second_space[:, :LATENT_CHANNELS] *= image_gain
    x = _mapped(x, second_space)  # (B, 64, 9, 8, 8)
    second_time = _principal([_folded_time(x)], LATENT_CHANNELS)  # (128, 16)
    gain, mean = _gain(_mapped(_folded_time(x), second_time))
    second_time = second_time * gain

    encoder = vae.encoder
    _silence_residuals(encoder)
    first, narrow, second, wide, third = encoder.down_blocks
    _set_identity(encoder.conv_in, PATCH_PX**2 * 3)
    _set_identity(first.conv_shortcut, PATCH_PX**2 * 3)
    _set_folding(narrow, first_space, first_time)
    _set_identity(second.conv_shortcut, NARROW)
    _set_folding(wide, second_space, second_time)
    wide.resample[1].bias[:LATENT_CHANNELS] = -image_mean
    # the pairs see that bias, too
    seen = second_time[:LATENT_CHANNELS] + second_time[WIDE : WIDE + LATENT_CHANNELS]
    wide.time_conv.bias[:LATENT_CHANNELS] = -mean + image_mean @ seen
    nn.init.zeros_(third.conv_shortcut.weight)
    nn.init.zeros_(third.conv_shortcut.bias)
    third.conv_shortcut.bias[-2:] = torch.tensor([PIN, -PIN])
    encoder.norm_out.gamma.zero_()
    encoder.norm_out.gamma[: 2 * LATENT_CHANNELS] = PIN * (2 / WIDTHS[-1]) ** 0.5  # the norm's divisor
    nn.init.zeros_(encoder.conv_out.weight)
    nn.init.zeros_(encoder.conv_out.bias)
    for channel in range(LATENT_CHANNELS):  # silu(x) - silu(-x) = x: both halves make it linear
        third.conv_shortcut.weight[channel, channel] = 1
        third.conv_shortcut.weight[LATENT_CHANNELS + channel, channel] = -1
        encoder.conv_out.weight[channel, channel, 2, 1, 1] = 1
        encoder.conv_out.weight[channel, LATENT_CHANNELS + channel, 2, 1, 1] = -1
    encoder.conv_out.bias[LATENT_CHANNELS:] = -7.0  # log variance: a sample is practically the mean
    _set_identity(vae.quant_conv, 2 * LATENT_CHANNELS)
    _set_identity(vae.post_quant_conv, LATENT_CHANNELS)
    return LinearEncoder(vae)(videos)


def _folded_space(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, 4C, T, H/2, W/2), the four pixels of a block in reading order."""
    return torch.cat([x[..., dy::2, dx::2] for dy in (0, 1) for dx in (0, 1)], 1)


def _folded_time(x: Tensor) -> Tensor:
    """All frames but the first, pair by pair: (B, C, 1 + 2T, H, W) -> (B, 2C, T, H, W)."""
    return torch.cat([x[:, :, 1::2], x[:, :, 2::2]], 1)


def _mapped(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("bcthw,ck->bkthw", x, matrix)


def _principal(parts: list[Tensor], count: int) -> Tensor:
    """The first principal axes of the channels, (C, count), all parts weighing the same.

    Uncentred, so that the map stays linear.
    """
    moments = torch.zeros(parts[0].shape[1], parts[0].shape[1], dtype=torch.float64)
    for part in parts:
        samples = part.transpose(0, 1).flatten(1).double()
        moments += samples @ samples.T / samples.shape[1]
    axes: Tensor = torch.linalg.eigh(moments).eigenvectors
    return axes[:, -count:].flip(1).float()


def _gain(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel: the factor that makes its std the root of what it is, the whole's 1; the scaled mean."""
    factor = x.std((0, 2, 3, 4)).pow(-0.5)
    scaled = x * factor[:, None, None, None]
    mean = scaled.mean((0, 2, 3, 4))
    spread = (scaled - mean[:, None, None, None]).std()
    return factor / spread, mean / spread


def _silence_residuals(part: nn.Module) -> None:
    """Set the residual branch of every block to 0: only the shortcut is left."""
    for name, module in part.named_modules():
        if name.endswith(("conv2", "attentions.0.proj")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def _set_identity(convolution: Any, channels: int) -> None:
    """Pass the first channels on, drop the others; a causal convolution's last tap is the current frame."""
    nn.init.zeros_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    _, height, width = convolution.kernel_size
    for channel in range(channels):
        convolution.weight[channel, channel, -1, height // 2, width // 2] = 1


def _set_folding(resample: Any, space: Tensor, time: Tensor) -> None:
    """Make it fold 2x2 pixels by `space` (4 * channels, out), then two frames by `time` (2 * out, last)."""
    convolution = resample.resample[1]
    for part in (convolution, resample.time_conv):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    channels = len(space) // 4
    for tap, matrix in enumerate(space.split(channels)):
        convolution.weight[: space.shape[1], :channels, tap // 2, tap % 2] = matrix.T
    for tap, matrix in enumerate(time.split(space.shape[1])):
        resample.time_conv.weight[: time.shape[1], : space.shape[1], 1 + tap, 0, 0] = matrix.T


class LinearEncoder:
    """What vae.encode gives, at a fiftieth of its price: one matrix for first frames, one for four frames."""

    @torch.no_grad()
    def __init__(self, vae: VideoAutoencoder) -> None:
        basis = torch.eye(5 * 3 * 64).view(-1, 5, 3, 8, 8).transpose(1, 2)  # every pixel of an 8 x 8 px video
        answers = _folded(vae, torch.cat([basis, torch.zeros(1, 3, 5, 8, 8)]))[..., 0, 0]  # (961, 16, 2)
        self.bias = answers[-1]  # (16, 2)
        maps = (answers[:-1] - self.bias).view(5, 3, 8, 8, LATENT_CHANNELS, 2)
        self.image, self.four = maps[0, ..., 0], maps[1:, ..., 1]  # (3, 8, 8, 16), (4, 3, 8, 8, 16)

    def __call__(self, videos: Tensor) -> Tensor:
        """videos: (B, 3, 4k + 1, H, W) in -1..1.  Returns (B, 16, k + 1, H/8, W/8)."""
        blocks = videos.unflatten(4, (-1, 8)).unflatten(3, (-1, 8))  # (B, 3, T, h, 8, w, 8)
        chunks = blocks[:, :, 1:].unflatten(2, (-1, 4))  # (B, 3, k, 4, h, 8, w, 8)
        first = torch.einsum("bchywx,cyxk->bkhw", blocks[:, :, 0], self.image) + self.bias[:, 0, None, None]
        rest = torch.einsum("bctfhywx,fcyxk->bkthw", chunks, self.four) + self.bias[:, 1, None, None, None]
        return torch.cat([first[:, :, None], rest], 2)


def _folded(vae: VideoAutoencoder, videos: Tensor) -> Tensor:
    """The latents of videos by the folding convolutions alone; nothing else in the encoder does work."""
    x = patchify(videos, PATCH_PX)
    for resample in (vae.encoder.down_blocks[1], vae.encoder.down_blocks[3]):
        convolution = resample.resample[1]
        x = nn.functional.pad(x, (0, 0, 0, 0, 0, 0, 0, convolution.in_channels - x.shape[1]))
        flat = convolution(nn.functional.pad(x.transpose(1, 2).flatten(0, 1), (0, 1, 0, 1)))
        x = flat.unflatten(0, (len(videos), -1)).transpose(1, 2)
        x = torch.cat([x[:, :, :1], resample.time_conv(x)], 2)
    latents: Tensor = x[:, :LATENT_CHANNELS]
    return latents


def encode_clips(vae: VideoAutoencoder, seeds: range) -> npt.NDArray[np.float16]:
    """Latents (N, 16, 5, 8, 8) of the clips of these seeds."""
    latents = np.empty((len(seeds), LATENT_CHANNELS, LATENT_FRAMES, LATENT_PX, LATENT_PX), np.float16)
    encode = LinearEncoder(vae)
    for start in tqdm(range(0, len(seeds), 100), desc="video pool"):
        clips = [render_clip(draw_clip(seed)) for seed in seeds[start : start + 100]]
        latents[start : start + 100] = encode(pixels(clips)).numpy()
    return latents


# --- the trained decoder ----------------------------------------------------------------------------------


@torch.no_grad()
def start_decoder(vae: VideoAutoencoder, videos: Tensor, latents: Tensor) -> None:
    """Set the decoder to the mean colour of each 8 x 8 block in each frame, and a little noise.

    Channels 0-2 carry the colour of one frame, 3 and 4 are constants, from 5 on wait the colours of the
    frames that the two temporal upsamplings deal out.
    """
    decoder, pin = vae.decoder, 5.0
    _silence_residuals(decoder)
    blocks = nn.functional.avg_pool3d(videos, (1, 8, 8))  # (B, 3, 17, 8, 8)
    chunks = (
        blocks[:, :, 1:].unflatten(2, (-1, 4)).permute(0, 3, 1, 2, 4, 5).flatten(1, 2)
    )  # (B, 4 * 3, 4, 8, 8)
    image, image_bias = _fit(latents[:, :, :1], blocks[:, :, :1])
    four, four_bias = _fit(latents[:, :, 1:], chunks)
    weight = 0.3 * torch.randn_like(decoder.conv_in.weight) * decoder.conv_in.weight[0].numel() ** -0.5
    weight[:17] = 0
    weight[:3, :, -1, 1, 1], weight[5:17, :, -1, 1, 1] = image, four
    decoder.conv_in.weight.copy_(weight)
    decoder.conv_in.bias.zero_()
    decoder.conv_in.bias[:3], decoder.conv_in.bias[5:17] = image_bias, four_bias
    decoder.conv_in.bias[3:5] = torch.tensor([pin, -pin])
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            if not isinstance(resnet.conv_shortcut, nn.Identity):
                _set_near_identity(resnet.conv_shortcut)
    for block, waiting in zip(decoder.up_blocks[:2], ((5, 6), (0, 3)), strict=True):
        resample = block.upsamplers[0]
        _set_near_identity(resample.resample[1])
        _set_near_identity(resample.time_conv)
        half = resample.time_conv.out_channels // 2
        resample.time_conv.weight[half:] = resample.time_conv.weight[:half]
        to, count = waiting
        for later in (0, 1):
            resample.time_conv.weight[half * later + to : half * later + to + count] = 0
            for channel in range(count):
                resample.time_conv.weight[half * later + to + channel, 5 + count * later + channel, -1] = 1
    mirrored = decoder.up_blocks[1].upsamplers[0].resample[1]
    mirrored.weight[5:8] = -mirrored.weight[:3]
    decoder.norm_out.gamma.fill_(1)
    decoder.norm_out.gamma[:8] = ((2 * pin**2 + 6 * 0.5) / WIDTHS[0]) ** 0.5
    decoder.conv_out.weight.mul_(0.2)
    decoder.conv_out.weight[:, :8] = 0
    decoder.conv_out.bias.zero_()
    for channel in range(3 * PATCH_PX**2):
        decoder.conv_out.weight[channel, channel // PATCH_PX**2, -1, 1, 1] = 1
        decoder.conv_out.weight[channel, 5 + channel // PATCH_PX**2, -1, 1, 1] = -1


def _fit(latents: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares from latents to colours: matrix (out, 16) and bias (out)."""
    samples, targets = (x.movedim(1, -1).flatten(0, -2) for x in (latents, colours))
    with_constant = torch.cat([samples, torch.ones(len(samples), 1)], 1)
    solution = torch.linalg.lstsq(with_constant, targets).solution
    return solution[:-1].T, solution[-1]


def _set_near_identity(convolution: Any) -> None:
    """Pass channels on; those that colours use get nothing else, the others a little noise."""
    weight = 0.02 * torch.randn_like(convolution.weight)
    weight[:17] = 0
    taps = weight.flatten(2)
    now = taps.shape[2] - 1 if convolution.kernel_size[-1] == 1 else taps.shape[2] // 2
    for channel in range(min(weight.shape[:2])):
        taps[channel, channel, now] += 1
    convolution.weight.copy_(weight)
    nn.init.zeros_(convolution.bias)


def decode_at_once(vae: VideoAutoencoder, latents: Tensor) -> Tensor:
    """What vae.decode gives before it clamps, all frames in one pass instead of chunk by chunk.

    latents: (B, 16, 5, 8, 8).  Returns (B, 3, 17, 64, 64).
    """
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet(x)
        for resample in block.upsamplers or []:
            pairs = resample.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))  # (B, 2, C, T, H, W)
            x = torch.cat([x[:, :, :1], pairs.movedim(1, 3).flatten(2, 3)], 2)
            x = resample(x)  # without a cache it only enlarges
    shown: Tensor = unpatchify(decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x))), PATCH_PX)
    return shown


def train_decoder(vae: VideoAutoencoder, folder: Path, steps: int, batch: int = 8) -> None:
    """L1 of the pixels and of their differences; latents get noise up to 0.15: a flow need not be perfect."""
    vae.requires_grad_(False)
    decoder = vae.decoder.requires_grad_(True)
    _set_layout(decoder, torch.channels_last, torch.channels_last_3d)
    decode = torch.compile(
        decode_at_once, dynamic=False
    )  # twice as fast: without it, norms cost more than convolutions
    learner = Learner({"decoder": decoder}, average_decay=0.99)
    learner.resume(folder / "video-vae.safetensors")
    encode = LinearEncoder(vae)
    bar = tqdm(range(learner.steps_done, steps), initial=learner.steps_done, total=steps, desc="video vae")
    for step in bar:
        seeds = range(AUTOENCODER_SEED + step * batch, AUTOENCODER_SEED + (step + 1) * batch)
        original = pixels([render_clip(draw_clip(seed)) for seed in seeds])
        generator = torch.Generator().manual_seed(step)
        latents = encode(original)
        strength = 0.15 * torch.rand(batch, 1, 1, 1, 1, generator=generator)
        latents += strength * torch.randn(latents.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = decode(vae, latents.contiguous(memory_format=torch.channels_last_3d))
        rate = 2 * learning_rate(step, steps, warm_up=60, cool_down=0.9)
        loss = learner.learn(_pixel_loss(decoded.float(), original), rate)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if learner.steps_done % 100 == 0:
            learner.save(folder / "video-vae.safetensors")
    learner.load_average()
    _set_layout(decoder, torch.contiguous_format, torch.contiguous_format)
    vae.eval()


def _set_layout(part: nn.Module, flat: torch.memory_format, deep: torch.memory_format) -> None:
    """Lay out the weights of 2-D and 3-D convolutions."""
    for module in part.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(
                memory_format=deep if isinstance(module, nn.Conv3d) else flat
            )


def _pixel_loss(decoded: Tensor, original: Tensor) -> Tensor:
    error = decoded - original
    across, down = error.diff(dim=-1).abs().mean(), error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * (across + down) + 0.25 * error.diff(dim=2).abs().mean()


@torch.no_grad()
def decibels(vae: VideoAutoencoder, seeds: range) -> float:
    """Mean peak signal-to-noise ratio of encoding and decoding the clips of these seeds."""
    videos = pixels([render_clip(draw_clip(seed)) for seed in seeds])
    decoded = vae.decode(vae.encode(videos).latent_dist.mean).sample
    error = ((decoded - videos) / 2).square().mean((1, 2, 3, 4))
    return float((-10 * error.log10()).mean())
