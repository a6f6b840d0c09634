"""Training of the tiny Stable Diffusion models: the text encoder parses captions, then the UNets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from tools.tiny_models.autoencoder import linear_encode, pixels
from tools.tiny_models.captions import caption
from tools.tiny_models.flow import EMPTY_SHARE, OBJECT_WEIGHT, Progress, TrainingRun
from tools.tiny_models.learner import ADAM_RATE, Learner, learning_rate
from tools.tiny_models.network import Autoencoder, CaptionParser, parse_labels
from tools.tiny_models.scenes import PICTURE_PX, SHAPES, Picture, Scene, cell_map, draw_scene, render
from tools.tiny_models.unet import (
    REFINER_TIME_IDS,
    TEXT_TOKENS,
    UNet,
    encode_text,
    normed,
    token_ids,
    without_projection,
)

NOISE = {  # Stable Diffusion's betas; what the network predicts is the velocity, see unet-card.md
    "num_train_timesteps": 1_000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}
MUON_RATE = 3e-3
SAVE_EVERY = 50
SHORT_TOKENS = 32  # every caption fits; the rest of the 77 is padding, which costs as much as words
LONG_SHARE = 0.15
TEXT_BATCH = 16  # captions encoded at once: what they need fits into the cache
ANY_SEED = 1_000_000  # text is learned without pictures, so any scene will do
VIEW_SHARE = 0.25  # of SDXL's pictures are enlarged or cropped, and its size numbers say so
ZEROS_SHARE = 0.75  # of SDXL's empty captions are zeros, as its pipeline passes where no negative prompt is
GOOD, POOR = 6.0, 2.5  # the aesthetic scores that the refiner's pipeline asks for and asks against


# --- text -------------------------------------------------------------------------------------------------


def train_text(encoder: Any, tokenizer: Any, run: TrainingRun, full_rate: float = 2.0) -> None:
    """Train the text encoder to parse: a CaptionParser predicts from it what each place shows.

    A tenth of the loss asks for states that their own norm leaves unchanged, so that both Stable Diffusions
    can read them.
    """
    torch.manual_seed(0)
    caption_parser = CaptionParser()
    learner = Learner({"clip": encoder, "caption_parser": caption_parser})
    learner.resume(run.folder / "text-unet.safetensors")
    progress = Progress("text-unet", learner, run)
    for step in range(learner.steps_done, run.steps):
        random = Random(f"unet-text/{run.seed}/{step}")
        scenes = [draw_scene(random.randrange(ANY_SEED), freedom=0) for _ in range(run.batch)]
        captions = [caption(scene, random) for scene in scenes]
        length = TEXT_TOKENS if random.random() < LONG_SHARE else SHORT_TOKENS
        with torch.autocast("cpu", torch.bfloat16):
            states, pooled = encode_text(encoder, token_ids(tokenizer, captions, length))
        states = states.float()
        parse = caption_parser(pooled.float(), normed(states), *parse_labels(scenes))
        drift = (states - normed(states)).square().mean()
        rate = full_rate * learning_rate(learner.steps_done, run.steps)
        progress.show(learner.learn(parse + 0.1 * drift, rate))
        save_when_due(learner, run, "text-unet")


# --- batches ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class View:
    """How a picture came to its 128 x 128 px, in SDXL's words."""

    original_px: int = PICTURE_PX  # its side before it was enlarged: less is blurred
    top: int = 0  # px cut off
    left: int = 0
    score: float = GOOD  # blurred ones are poor

    @property
    def size_numbers(self) -> list[float]:
        """The size numbers of SDXL's UNet: original size, crop, target size."""
        return [self.original_px, self.original_px, self.top, self.left, PICTURE_PX, PICTURE_PX]


@dataclass(frozen=True, slots=True)
class UNetBatch:
    """Noisy latents, their captions, and what the UNet should predict; B of each."""

    captions: list[str]
    views: list[View]
    noisy: Tensor  # (B, 16, 16, 16)
    times: Tensor  # (B,) timesteps 0..999
    target: Tensor  # (B, 16, 16, 16)
    weights: Tensor  # (B, 1, 16, 16), mean 1 per picture

    def loss(self, answer: Tensor) -> Tensor:
        """Weighted squared error: places with an object count four times."""
        return ((answer.float() - self.target).square() * self.weights).mean()


def unet_batches(
    pool: npt.NDArray[np.float16],
    run: TrainingRun,
    start: int,
    *,
    latest: int = 1_000,
    vae: Autoencoder | None = None,
) -> Iterator[UNetBatch]:
    """Batches from step `start` on; pool: (N, 16, 16, 16), the latents of seeds 0..N-1.

    latest: timesteps lie below it.  vae: given, some pictures come enlarged or cropped.  Each step has its
    own seed, so a resumed run sees what an unbroken one would have seen.
    """
    for step in range(start, run.steps):
        random = Random(f"unet/{run.seed}/{step}")
        seeds = [random.randrange(len(pool)) for _ in range(run.batch)]
        scenes = [draw_scene(seed) for seed in seeds]
        captions = ["" if random.random() < EMPTY_SHARE else caption(scene, random) for scene in scenes]
        latents = torch.from_numpy(pool[seeds].astype(np.float32))
        views = [View()] * run.batch
        if vae is not None:
            views = [_draw_view(random) for _ in scenes]
            changed = [index for index, view in enumerate(views) if view != View()]
            if pictures := [_viewed(views[index], scenes[index]) for index in changed]:
                latents[changed] = linear_encode(vae, pixels(pictures))
        yield noised(latents, scenes, captions, views, random, latest)


def noised(
    latents: Tensor,
    scenes: list[Scene],
    captions: list[str],
    views: list[View],
    random: Random,
    latest: int = 1_000,
) -> UNetBatch:
    """The batch of these latents (B, 16, 16, 16), at timesteps spread evenly below `latest`."""
    count = len(scenes)
    generator = torch.Generator().manual_seed(random.getrandbits(60))
    noise = torch.randn(latents.shape, generator=generator)
    even = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    times = (even * latest).long()[torch.randperm(count, generator=generator)]
    cells = torch.from_numpy(np.stack([cell_map(scene)[..., 0] for scene in scenes]))[:, None]
    weights = torch.where(cells < len(SHAPES), OBJECT_WEIGHT, 1.0)
    weights = (weights / weights.mean((2, 3), keepdim=True)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    noise_scheduler = DDPMScheduler(**NOISE)
    noisy = noise_scheduler.add_noise(latents, noise, times)
    target = noise_scheduler.get_velocity(latents, noise, times)
    return UNetBatch(captions, views, noisy, times, target, weights)


def _draw_view(random: Random) -> View:
    kind = random.random()
    if kind < VIEW_SHARE / 2:
        return View(original_px=random.randrange(24, 72), score=POOR + random.uniform(-0.5, 0.5))
    score = GOOD + random.uniform(-0.5, 0.5)
    if kind < VIEW_SHARE:
        return View(top=random.randrange(0, 40), left=random.randrange(0, 40), score=score)
    return View()


@torch.no_grad()
def _viewed(view: View, scene: Scene) -> Picture:
    picture = render(scene)
    if view.original_px < PICTURE_PX:
        small = picture.resize((view.original_px, view.original_px), Image.Resampling.BOX)
        picture = small.resize(picture.size, Image.Resampling.BICUBIC)
    canvas: Picture = np.pad(np.asarray(picture), ((0, view.top), (0, view.left), (0, 0)), mode="edge")
    return canvas[view.top :, view.left :]


# --- conditioning -----------------------------------------------------------------------------------------

Conditioning = tuple[
    Tensor, dict[str, Tensor] | None
]  # text states (B, 77, width), and SDXL's further conditions
Conditioner = Callable[[UNetBatch], Conditioning]


def sd_condition(encoder: Any, tokenizer: Any) -> Conditioner:
    """The conditioning of Stable Diffusion 1.5's UNet by an encoder with a projection."""
    return text_condition(without_projection(encoder, tokenizer), tokenizer)


def text_condition(encoder: Any, tokenizer: Any) -> Conditioner:
    """The conditioning of Stable Diffusion 1.5's UNet by its own text encoder."""
    shorter = encoder.eval().bfloat16()

    def condition(batch: UNetBatch) -> Conditioning:
        ids = token_ids(tokenizer, batch.captions)
        return torch.cat([shorter(part)[0] for part in ids.split(TEXT_BATCH)]).float(), None

    return condition


def sdxl_condition(encoder: Any, tokenizer: Any) -> Conditioner:
    """The conditioning of SDXL's UNet: the states of two encoders (here equal), pooled text, sizes."""

    def condition(batch: UNetBatch) -> Conditioning:
        states, pooled = _encode(encoder, tokenizer, batch.captions)
        empty = torch.tensor([not text for text in batch.captions])
        zeros = empty & (torch.rand(len(empty)) < ZEROS_SHARE)
        states[zeros], pooled[zeros] = 0, 0
        sizes = torch.tensor([view.size_numbers for view in batch.views])
        return torch.cat([states, states], -1), {"text_embeds": pooled, "time_ids": sizes}

    return condition


def refiner_condition(encoder: Any, tokenizer: Any) -> Conditioner:
    """The conditioning of the refiner: one encoder's states, and a score where SDXL has the target size."""

    def condition(batch: UNetBatch) -> Conditioning:
        states, pooled = _encode(encoder, tokenizer, batch.captions)
        rows = [[*view.size_numbers[: REFINER_TIME_IDS - 1], view.score] for view in batch.views]
        return states, {"text_embeds": pooled, "time_ids": torch.tensor(rows)}

    return condition


def _encode(encoder: Any, tokenizer: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        parts = [encode_text(encoder, part) for part in token_ids(tokenizer, captions).split(TEXT_BATCH)]
    return torch.cat([states for states, _ in parts]).float(), torch.cat(
        [pooled for _, pooled in parts]
    ).float()


# --- training ---------------------------------------------------------------------------------------------


def train_unet(
    unet: UNet,
    condition: Conditioner,
    batches_from: Callable[[int], Iterator[UNetBatch]],
    run: TrainingRun,
    *,
    name: str,
    full_rate: float = 1.0,
) -> None:
    """Diffusion training: predict the velocity.  full_rate is in units of the learner's rates."""
    prepare_for_training(unet)
    forward = torch.compile(unet, dynamic=False) if run.compiled else unet
    learner = UNetLearner({"unet": unet})
    learner.resume(run.folder / f"{name}.safetensors")
    progress = Progress(name, learner, run)
    for batch in batches_from(learner.steps_done):
        with torch.no_grad():
            context, added = condition(batch)
        noisy = batch.noisy.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            answer = forward(noisy, batch.times, context, added_cond_kwargs=added).sample
        rate = full_rate * learning_rate(learner.steps_done, run.steps)
        progress.show(learner.learn(batch.loss(answer), rate))
        save_when_due(learner, run, name)


def prepare_for_training(network: Any) -> None:
    """Convolutions in the order that oneDNN likes, and attention written out: its flash backward is slow."""
    network.train().to(memory_format=torch.channels_last)
    network.set_attn_processor(AttnProcessor())


class UNetLearner(Learner):
    """Trains a UNet: Muon for the matrices and convolutions of its blocks, AdamW for everything else."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__(modules)
        in_blocks = {name for name in self.weights if "_block" in name and self.weights[name].ndim > 1}
        blocks = [weight for name, weight in self.weights.items() if name in in_blocks]
        others = [weight for name, weight in self.weights.items() if name not in in_blocks]
        adam = torch.optim.AdamW(others, ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)
        self.optimisers = [(ConvolutionMuon(blocks, MUON_RATE), MUON_RATE), (adam, ADAM_RATE)]


class ConvolutionMuon(torch.optim.Optimizer):
    """Muon that takes convolutions, too: a kernel counts as the matrix (out, in * height * width)."""

    def __init__(
        self, weights: ParamsT, lr: float, momentum: float = 0.95, weight_decay: float = 0.02
    ) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """One step; every update has the size of one of AdamW's (root mean square 0.2)."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"]
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = _orthogonal(weight.grad.lerp(buffer, group["momentum"]).flatten(1))
                size = 0.2 * max(update.shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.view(weight.shape), alpha=-group["lr"] * size)


def _orthogonal(matrix: Tensor) -> Tensor:
    """Roughly the nearest orthogonal matrix: five Newton-Schulz rounds in bf16, Keller Jordan's constants."""
    x = matrix.bfloat16()
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.T).to(matrix.dtype)


def save_when_due(learner: Learner, run: TrainingRun, name: str) -> None:
    """Write a checkpoint every so many steps and at the end."""
    if learner.steps_done % SAVE_EVERY == 0 or learner.steps_done == run.steps:
        learner.save(run.folder / f"{name}.safetensors")


def load_trained(checkpoint: Path, name: str, network: nn.Module) -> None:
    """Put a checkpoint's running average into all weights that are trained; the others stay as built."""
    with safe_open(checkpoint, framework="pt") as state, torch.no_grad():
        for key, weight in network.named_parameters():
            if weight.requires_grad:
                weight.copy_(state.get_tensor(f"average.{name}.{key}"))
