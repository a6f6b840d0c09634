"""Training of the tiny FLUX: parsing of captions, then rectified flow, then guidance distillation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]  # it ships no types

from tools.tiny_models.captions import caption
from tools.tiny_models.learner import Learner, learning_rate
from tools.tiny_models.network import (
    LATENT_CHANNELS,
    LATENT_SIDE,
    CaptionParser,
    Flow,
    TextEncoders,
    pack,
    parse_labels,
)
from tools.tiny_models.scenes import SHAPES, Scene, Variation, draw_scene

SHORT, LONG = 24, 64  # T5 tokens: most captions fit into 24; the service pads to 64
LONG_SHARE = 0.12
EMPTY_SHARE = 0.08  # captions left out, for classifier-free guidance
SMALL_SHARE = 0.25  # of the pictures are drawn from those with a small object, the hardest
PAIRS_KEPT = 0.6  # of the drawings with two different objects: these are learned sooner than small ones
OBJECT_WEIGHT = 4.0  # tokens with an object count four times: flat background is learned soon enough
LAYOUT_CHANNELS = {"across": 15, "down": 9, "size": 10, "turn": 11, "light": 7}  # of the latents
PLAIN_BELOW, PLAIN_SHARE = 0.8, 0.3  # of the noise shares below 0.8, three in ten hold no layout
SAVE_EVERY = 100
SCHNELL_TIMES = torch.tensor([1.0, 0.75, 0.5, 0.25])  # where four steps evaluate the transformer


@dataclass(frozen=True, slots=True)
class Batch:
    """Captions and what they describe."""

    captions: list[str]
    length: int  # of T5 tokens
    cells: Tensor  # (B, 64, 3) indices of scenes.cell_map
    mentioned: Tensor  # (B, 2) indices of scenes.mentioned
    variation: Tensor  # (B, 5) scenes.Variation of each, -1..1
    picture: Tensor  # (B, 64, 64) packed latents
    random: torch.Generator

    @property
    def token_weights(self) -> Tensor:
        """(B, 64, 1), mean 1 per picture; they depend on what caption and noise determine, so the
        flow stays unbiased."""
        weights = torch.where(self.cells[..., :1] < len(SHAPES), OBJECT_WEIGHT, 1.0)
        return weights / weights.mean(1, keepdim=True)


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """Where and how long to train."""

    folder: Path  # checkpoints
    steps: int
    batch: int = 64  # pictures per process and step
    seed: int = 0
    rank: int = 0  # of this process
    compiled: bool = True


def batches(
    pool: npt.NDArray[np.float16], encoders: TextEncoders, run: TrainingRun, start: int, freedom: float = 1.0
) -> Iterator[Batch]:
    """Batches from step `start` on; pool: (N, 16, 16, 16), the latents of seeds 0..N-1.

    freedom: of the scenes, see `draw_scene`.  Each step has its own seed, so a resumed run sees what an
    unbroken one would have seen.
    """
    for step in range(start, run.steps):
        together = Random(f"{run.seed}/{step}")  # the same in every process
        random = Random(f"{run.seed}/{step}/{run.rank}")
        length = LONG if together.random() < LONG_SHARE else SHORT
        picks = [_pick(random, len(pool), freedom) for _ in range(run.batch)]
        seeds, scenes = [seed for seed, _ in picks], [scene for _, scene in picks]
        captions = [caption(scene, random) for scene in scenes]
        counts = [len(ids) for ids in encoders.t5_tokenizer(captions).input_ids]
        for index, scene in enumerate(scenes):
            if counts[index] > length:  # never train on half a caption
                captions[index] = caption(scene, random, plain=True)
            if random.random() < EMPTY_SHARE:
                captions[index] = ""
        cells, mentioned = parse_labels(scenes)
        variation = torch.tensor([scene.variation for scene in scenes])
        latents = torch.from_numpy(pool[seeds].astype(np.float32))
        generator = torch.Generator().manual_seed(random.getrandbits(60))
        yield Batch(captions, length, cells, mentioned, variation, pack(latents), generator)


def _pick(random: Random, count: int, freedom: float) -> tuple[int, Scene]:
    """A seed below `count` and its drawing, without patterns; with more small objects and fewer pairs."""
    wants_small = random.random() < SMALL_SHARE
    while True:
        seed = random.randrange(count)
        scene = draw_scene(seed, freedom=freedom)
        is_spared = scene.kind == "patterned" or (scene.kind == "two" and random.random() > PAIRS_KEPT)
        if not is_spared and (scene.size == "small" or not wants_small):
            return seed, scene


def train_text(
    encoders: TextEncoders, caption_parser: CaptionParser, run: TrainingRun, full_rate: float
) -> None:
    """Train the encoders to parse captions, which needs no pictures and is a hundred times cheaper.

    full_rate: the highest learning rate, in units of the learner's.
    """
    modules: dict[str, nn.Module] = {
        "clip": encoders.clip,
        "t5": encoders.t5,
        "caption_parser": caption_parser,
    }
    learner = Learner(modules)
    learner.resume(run.folder / "text.safetensors")
    no_pictures = np.zeros((1_000_000, 1, 2, 2), np.float16)
    progress = Progress("text", learner, run)
    for batch in batches(no_pictures, encoders, run, learner.steps_done, freedom=0):  # no caption names it
        with torch.autocast("cpu", torch.bfloat16):
            pooled, context = encoders.encode(batch.captions, batch.length)
        has_text = torch.tensor([bool(text) for text in batch.captions])
        loss = caption_parser(
            pooled.float()[has_text],
            context.float()[has_text],
            batch.cells[has_text],
            batch.mentioned[has_text],
        )
        progress.show(learner.learn(loss, full_rate * learning_rate(learner.steps_done, run.steps)))
        save_when_due(learner, run, "text")


def train_flow(encoders: TextEncoders, flow: Flow, pool: npt.NDArray[np.float16], run: TrainingRun) -> None:
    """Rectified flow on the pool: predict noise - picture from any mixture; the encoders stay fixed."""
    learner = Learner({"transformer": flow.transformer})
    learner.resume(run.folder / "flow.safetensors")
    progress = Progress("flow", learner, run)
    for batch in batches(pool, encoders, run, learner.steps_done):
        time = noise_shares(len(batch.captions), batch.random)
        noise = layout_noise(batch.variation, time, batch.random)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            pooled, context = encoders.encode(batch.captions, batch.length)
        mixed = torch.lerp(batch.picture, noise, time[:, None, None])
        error = flow(mixed, pooled.float(), context.float(), time) - (noise - batch.picture)
        rate = learning_rate(learner.steps_done, run.steps)
        progress.show(learner.learn((error.square() * batch.token_weights).mean(), rate))
        save_when_due(learner, run, "flow")


def noise_shares(count: int, random: torch.Generator) -> Tensor:
    """Noise shares 0..1: half where four steps look, the rest spread out, more of them near noise."""
    four = SCHNELL_TIMES[torch.randint(4, (count,), generator=random)]
    spread = torch.sigmoid(torch.randn(count, generator=random) + 0.4)
    even = torch.rand(count, generator=random)
    choice = torch.rand(count, generator=random)
    return torch.where(choice < 0.5, four, torch.where(choice < 0.8, spread, even))


def layout_noise(variation: Tensor, time: Tensor, random: torch.Generator) -> Tensor:
    """Noise (B, 64, 64) in which a drawing's free numbers (B, 5) are hidden: means of five latent channels.

    A rectified flow may pair noise and pictures as it likes, as long as all noise together is normal; it is,
    for the mean of 256 normal numbers is one itself.  Noise paired at random leaves open where an object will
    stand, so the first of four steps sees the mean of all places; this noise determines it.  The channels
    are those whose means hardly differ between drawings.  Where less than 0.8 is noise (time), some of it is
    plain: image to image starts there, from pictures that were not paired with noise.
    """
    noise = torch.randn(len(variation), LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE, generator=random)
    plain = (time < PLAIN_BELOW) & (torch.rand(len(variation), generator=random) < PLAIN_SHARE)
    normal = math.sqrt(2) * torch.erfinv(variation.clamp(-0.99999, 0.99999))
    for index, name in enumerate(Variation._fields):
        channel = noise[:, LAYOUT_CHANNELS[name]]  # (B, 16, 16)
        shift = normal[:, index] / LATENT_SIDE - channel.mean((1, 2))
        channel += torch.where(plain, 0.0, shift)[:, None, None]
    return pack(noise)


def distil_guidance(
    encoders: TextEncoders,
    flow: Flow,
    teacher: Flow,
    pool: npt.NDArray[np.float16],
    run: TrainingRun,
    scales: tuple[float, float],
    name: str,
) -> None:
    """Train `flow` to do in one call what classifier-free guidance does in two calls of the teacher.

    scales: the range of guidance that it receives (dev).  A transformer without a guidance embedding gets it
    built in, at the times that four steps evaluate (schnell).  name: of the checkpoint.
    """
    learner = Learner({"transformer": flow.transformer}, average_decay=0.99)
    learner.resume(run.folder / f"{name}.safetensors")
    teacher.transformer.requires_grad_(False)
    takes_guidance = flow.transformer.config["guidance_embeds"]
    progress = Progress(name, learner, run)
    for batch in batches(pool, encoders, run, learner.steps_done):
        count = len(batch.captions)
        four = SCHNELL_TIMES[torch.randint(4, (count,), generator=batch.random)]
        time = noise_shares(count, batch.random) if takes_guidance else four
        noise = layout_noise(batch.variation, time, batch.random)
        scale = scales[0] + (scales[1] - scales[0]) * torch.rand(count, generator=batch.random)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            pooled, context = (part.float() for part in encoders.encode(batch.captions, batch.length))
            empty_pooled, empty_context = (part.float() for part in encoders.encode([""], batch.length))
        with torch.no_grad():
            mixed = torch.lerp(batch.picture, noise, time[:, None, None])
            with_prompt = teacher(mixed, pooled, context, time)
            empty_pooled, empty_context = empty_pooled.expand(count, -1), empty_context.repeat(count, 1, 1)
            without = teacher(mixed, empty_pooled, empty_context, time)
            target = without + scale[:, None, None] * (with_prompt - without)
        error = flow(mixed, pooled, context, time, scale if takes_guidance else None) - target
        rate = 0.4 * learning_rate(learner.steps_done, run.steps, warm_up=20, cool_down=0.8)
        progress.show(learner.learn((error.square() * batch.token_weights).mean(), rate))
        save_when_due(learner, run, name)


class Progress:
    """A progress bar with a running mean of the loss, in the first process only."""

    def __init__(self, name: str, learner: Learner, run: TrainingRun) -> None:
        self.bar = tqdm(total=run.steps, initial=learner.steps_done, desc=name, disable=run.rank > 0)
        self.loss: float | None = None

    def show(self, loss: float) -> None:
        """Count one step."""
        self.loss = loss if self.loss is None else 0.98 * self.loss + 0.02 * loss
        self.bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
        self.bar.update()


def save_when_due(learner: Learner, run: TrainingRun, name: str) -> None:
    if run.rank == 0 and (learner.steps_done % SAVE_EVERY == 0 or learner.steps_done == run.steps):
        learner.save(run.folder / f"{name}.safetensors")
