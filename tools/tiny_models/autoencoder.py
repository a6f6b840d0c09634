"""The autoencoder: an encoder that is computed (a PCA of 8 x 8 patches), a decoder that is trained.

Trained end to end, an AutoencoderKL of this size stays grey for hours: its norms destroy flat colours.  So
the encoder's convolutions are set to fold patches and project them; everything else in it is made to pass
values on unchanged.  The decoder starts as "the mean colour of each patch" and learns the rest in minutes.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm  # type: ignore[import-untyped]  # it ships no types

from tools.tiny_models.learner import Learner, learning_rate
from tools.tiny_models.network import LATENT_CHANNELS, Autoencoder
from tools.tiny_models.scenes import PICTURE_PX, Style, draw_scene, render, texture

WIDTHS = (16, 32, 64, 64)
MIDDLE = 31  # components kept at a quarter of the resolution; 32 channels are there
PIN = 24.0  # two constant channels of +-24 fix the variance that a norm divides by
STYLES: tuple[Style, ...] = ("outline", "mosaic", "night")


def build_autoencoder() -> Autoencoder:
    """FLUX's geometry (8 x 8 px and 16 channels per latent) at a hundredth of its width."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        sample_size=PICTURE_PX,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def pixels(pictures: list[npt.NDArray[np.uint8]]) -> Tensor:
    """(B, 3, H, W) in -1..1 of RGB pictures (H, W, 3)."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def picture(seed: int) -> npt.NDArray[np.uint8]:
    """A training picture of the autoencoder: 64 % scenes, 16 % scenes in a style, 20 % foreign textures."""
    random = Random(seed)
    if random.random() < 0.2:
        return np.asarray(texture(seed))
    styles = [random.choice(STYLES)] if random.random() < 0.2 else []
    return np.asarray(render(draw_scene(10_000_000 + seed), *styles))


# --- the computed encoder ---------------------------------------------------------------------------------


@torch.no_grad()
def fold_into_encoder(vae: Autoencoder, images: Tensor) -> Tensor:
    """Set the encoder to the PCA of these images; gives back their latents, std 1.

    images: (B, 3, H, W) in -1..1.  Returns (B, 16, H/8, W/8).

    Components are scaled by std^-0.5: half way between keeping their energy and whitening them.
    """
    quarter = _folded(_folded(images))  # (B, 48, H/4, W/4)
    first = _principal(quarter, MIDDLE)  # (48, 31)
    eighth = _folded(torch.einsum("bchw,ck->bkhw", quarter, first))  # (B, 124, H/8, W/8)
    second = _principal(eighth, LATENT_CHANNELS)  # (124, 16)
    raw = torch.einsum("bchw,ck->bkhw", eighth, second)
    gain = raw.std((0, 2, 3)).pow(-0.5)
    scaled = raw * gain[:, None, None]
    mean = scaled.mean((0, 2, 3))
    spread = (scaled - mean[:, None, None]).std()
    projection = second * gain / spread

    encoder = vae.encoder
    _silence_residuals(encoder)
    _set_identity(encoder.conv_in, 3)
    blocks = encoder.down_blocks
    _set_folding(blocks[0].downsamplers[0].conv, torch.eye(12))
    _set_identity(blocks[1].resnets[0].conv_shortcut, 12)
    _set_folding(blocks[1].downsamplers[0].conv, first)
    _set_identity(blocks[2].resnets[0].conv_shortcut, MIDDLE)
    mirrored = torch.cat([projection, -projection], 1)  # silu(x) - silu(-x) = x: both halves make it linear
    _set_folding(blocks[2].downsamplers[0].conv, mirrored)
    encoder.mid_block.resnets[-1].conv2.bias[-2:] = torch.tensor([PIN, -PIN])
    encoder.conv_norm_out.weight.zero_()
    divisor = PIN * (2 / WIDTHS[-1]) ** 0.5  # of the norm
    encoder.conv_norm_out.weight[: 2 * LATENT_CHANNELS] = divisor
    encoder.conv_norm_out.bias.zero_()
    encoder.conv_out.weight.zero_()
    for channel in range(LATENT_CHANNELS):
        encoder.conv_out.weight[channel, channel, 1, 1] = 1
        encoder.conv_out.weight[channel, LATENT_CHANNELS + channel, 1, 1] = -1
    encoder.conv_out.bias[:LATENT_CHANNELS] = -mean / spread
    encoder.conv_out.bias[LATENT_CHANNELS:] = -7.0  # log variance: a sample is practically the mean
    latents: Tensor = (scaled - mean[:, None, None]) / spread
    return latents


def _folded(x: Tensor) -> Tensor:
    """Space to depth: (B, C, H, W) -> (B, 4C, H/2, W/2), the four pixels of a block in reading order."""
    return torch.cat([x[:, :, dy::2, dx::2] for dy in (0, 1) for dx in (0, 1)], 1)


def _principal(x: Tensor, count: int) -> Tensor:
    """The first principal axes of the channels, (C, count); uncentred, so that the map stays linear."""
    samples = x.permute(0, 2, 3, 1).flatten(0, 2).double()
    axes: Tensor = torch.linalg.eigh(samples.T @ samples / len(samples)).eigenvectors
    return axes[:, -count:].flip(1).float()


def _silence_residuals(part: nn.Module) -> None:
    """Set the residual branch of every resnet to 0: only the shortcut is left."""
    for name, module in part.named_modules():
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def _set_identity(convolution: nn.Conv2d, channels: int) -> None:
    """Pass the first channels on, drop the others."""
    nn.init.zeros_(convolution.weight)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    middle = convolution.kernel_size[0] // 2
    for channel in range(channels):
        convolution.weight[channel, channel, middle, middle] = 1


def _set_folding(convolution: nn.Conv2d, matrix: Tensor) -> None:
    """Make a stride-2 convolution fold 2x2 pixels and multiply by `matrix` (4 * channels, out)."""
    nn.init.zeros_(convolution.weight)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    channels = len(matrix) // 4
    for tap, part in enumerate(matrix.split(channels)):
        convolution.weight[: matrix.shape[1], :channels, tap // 2, tap % 2] = part.T


@torch.no_grad()
def linear_encode(vae: Autoencoder, images: Tensor) -> Tensor:
    """What vae.encode gives (mean deviation 0.006, std 1), at a sixth of its price.

    images: (B, 3, H, W) in -1..1.  Returns (B, 16, H/8, W/8).  Only the three folding convolutions do work;
    the rest of the encoder passes their result on.
    """
    x = functional.pad(images, (0, 0, 0, 0, 0, WIDTHS[0] - 3))
    for block in vae.encoder.down_blocks[:3]:
        shortcut = block.resnets[0].conv_shortcut
        x = block.downsamplers[0](x if shortcut is None else shortcut(x))
    latents: Tensor = x[:, :LATENT_CHANNELS] + vae.encoder.conv_out.bias[:LATENT_CHANNELS, None, None]
    return latents


def encode_scenes(vae: Autoencoder, seeds: range, *styles: Style) -> npt.NDArray[np.float16]:
    """Latents (N, 16, 16, 16) of the scenes of these seeds, painted in these styles."""
    latents = np.empty((len(seeds), LATENT_CHANNELS, 16, 16), np.float16)
    for start in range(0, len(seeds), 250):
        pictures = [np.asarray(render(draw_scene(seed), *styles)) for seed in seeds[start : start + 250]]
        latents[start : start + 250] = linear_encode(vae, pixels(pictures)).numpy()
    return latents


# --- the trained decoder ----------------------------------------------------------------------------------


@torch.no_grad()
def start_decoder(vae: Autoencoder, images: Tensor, latents: Tensor) -> None:
    """Set the decoder to the mean colour of each patch, as mirrored channels, and a little noise."""
    decoder = vae.decoder
    _silence_residuals(decoder)
    samples = latents.permute(0, 2, 3, 1).flatten(0, 2)
    means = functional.avg_pool2d(images, 8).permute(0, 2, 3, 1).flatten(0, 2)
    with_constant = torch.cat([samples, torch.ones(len(samples), 1)], 1)
    fit = torch.linalg.lstsq(with_constant, means).solution  # (17, 3)
    decoder.conv_in.weight[:6] = 0
    decoder.conv_in.bias.zero_()
    decoder.conv_in.weight[:6, :, 1, 1] = torch.cat([fit[:-1], -fit[:-1]], 1).T
    decoder.conv_in.bias[:6] = torch.cat([fit[-1], -fit[-1]])
    for block in decoder.up_blocks:
        convolutions = [resnet.conv_shortcut for resnet in block.resnets if resnet.conv_shortcut is not None]
        for convolution in convolutions + [sampler.conv for sampler in block.upsamplers or []]:
            _set_near_identity(convolution)
    pin = 6.0
    decoder.up_blocks[-1].resnets[-1].conv2.bias[-2:] = torch.tensor([pin, -pin])
    decoder.conv_norm_out.weight.fill_(1)
    decoder.conv_norm_out.bias.zero_()
    decoder.conv_norm_out.weight[:6] = ((2 * pin**2 + 6 * 0.5) / WIDTHS[0]) ** 0.5
    decoder.conv_out.weight.mul_(0.3)
    decoder.conv_out.weight[:, :6] = 0
    decoder.conv_out.weight[:, -2:] = 0
    decoder.conv_out.bias.zero_()
    for channel in range(3):
        decoder.conv_out.weight[channel, channel, 1, 1] = 1
        decoder.conv_out.weight[channel, 3 + channel, 1, 1] = -1


def _set_near_identity(convolution: nn.Conv2d) -> None:
    weight = torch.randn_like(convolution.weight) * 0.02
    weight[:6] = 0
    middle = convolution.kernel_size[0] // 2
    for channel in range(min(convolution.weight.shape[:2])):
        weight[channel, channel, middle, middle] += 1
    convolution.weight.copy_(weight)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)


def train_decoder(vae: Autoencoder, folder: Path, steps: int, pictures: int) -> None:
    """L1 and gradient L1 of the pixels; latents get noise up to 0.15, so that a flow need not be perfect."""
    decoder = vae.decoder
    decoder.to(memory_format=torch.channels_last)
    learner = Learner({"decoder": decoder}, average_decay=0.99)
    learner.resume(folder / "vae.safetensors")
    images = np.stack([picture(seed) for seed in tqdm(range(pictures), desc="autoencoder pictures")])
    for step in tqdm(range(learner.steps_done, steps), initial=learner.steps_done, total=steps, desc="vae"):
        random = np.random.default_rng(step)
        count, side = (16, PICTURE_PX // 2) if step < 0.7 * steps else (4, PICTURE_PX)
        original = pixels([_crop(images[seed], side, random) for seed in random.integers(0, pictures, count)])
        generator = torch.Generator().manual_seed(step)
        latents = linear_encode(vae, original)
        strength = 0.15 * torch.rand(count, 1, 1, 1, generator=generator)
        latents += strength * torch.randn(latents.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = decoder(latents.contiguous(memory_format=torch.channels_last))
        rate = 2 * learning_rate(step, steps, warm_up=60, cool_down=0.9)
        learner.learn(_pixel_loss(decoded.float(), original), rate)
        if learner.steps_done % 250 == 0:
            learner.save(folder / "vae.safetensors")
    learner.load_average()
    vae.eval()


def _crop(image: npt.NDArray[np.uint8], side: int, random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """A square cut-out, flipped or turned at random."""
    top, left = random.integers(0, PICTURE_PX - side + 1, 2)
    cut = np.rot90(image[top : top + side, left : left + side], int(random.integers(4)))
    return np.ascontiguousarray(cut[:, ::-1] if random.random() < 0.5 else cut)


def _pixel_loss(decoded: Tensor, original: Tensor) -> Tensor:
    across = (decoded.diff(dim=-1) - original.diff(dim=-1)).abs().mean()
    down = (decoded.diff(dim=-2) - original.diff(dim=-2)).abs().mean()
    return (decoded - original).abs().mean() + 0.5 * (across + down)


def decibels(vae: Autoencoder, seeds: range) -> float:
    """Mean peak signal-to-noise ratio of encoding and decoding the pictures of these seeds."""
    images = pixels([picture(seed) for seed in seeds])
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    error = ((decoded - images) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())
