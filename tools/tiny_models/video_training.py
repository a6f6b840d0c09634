"""Training of the video model: parsing of captions, then rectified flow on the latents of clips."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]  # it ships no types

from tools.tiny_models.learner import Learner, learning_rate
from tools.tiny_models.video import TOKENS, VideoCaptionParser, VideoFlow, VideoText, attribute_labels
from tools.tiny_models.video_scenes import Clip, caption, coverage, draw_clip

EMPTY_SHARE = 0.1  # captions left out, for classifier-free guidance
OBJECT_WEIGHT = 4.0  # latents where the object passes count four times: flat background is soon learned
SAVE_EVERY = 100
LENGTHS = (32, 64, 64, 128, 226, 512)  # max_sequence_length of a request


@dataclass(frozen=True, slots=True)
class VideoBatch:
    """Clips, their captions and their latents."""

    clips: list[Clip]
    captions: list[str]
    latents: Tensor  # (B, 16, 5, 8, 8)
    random: torch.Generator

    @property
    def weights(self) -> Tensor:
        """(B, 1, 5, 8, 8), mean 1 per clip; they depend on the clip's layout alone."""
        covered = torch.from_numpy(np.stack([coverage(clip) for clip in self.clips]))[:, None]
        weights = torch.where(covered, OBJECT_WEIGHT, 1.0)
        return weights / weights.mean((1, 2, 3, 4), keepdim=True)


@dataclass(frozen=True, slots=True)
class VideoTrainingRun:
    """Where and how long to train."""

    folder: Path  # checkpoints
    steps: int
    batch: int = 48
    compiled: bool = True


def video_batches(
    pool: npt.NDArray[np.float16] | None, text: VideoText, run: VideoTrainingRun, start: int
) -> Iterator[VideoBatch]:
    """Batches from step `start` on; pool: (N, 16, 5, 8, 8), latents of seeds 0..N-1, or None for none.

    Each step has its own seed, so a resumed run sees what an unbroken one would have seen.
    """
    for step in range(start, run.steps):
        random = Random(f"video/{step}")
        seeds = [random.randrange(1_000_000 if pool is None else len(pool)) for _ in range(run.batch)]
        clips = [draw_clip(seed) for seed in seeds]
        captions = [_fitting_caption(clip, text, random) for clip in clips]
        latents = torch.zeros(1) if pool is None else torch.from_numpy(pool[seeds].astype(np.float32))
        generator = torch.Generator().manual_seed(random.getrandbits(60))
        yield VideoBatch(clips, captions, latents, generator)


def _fitting_caption(clip: Clip, text: VideoText, random: Random) -> str:
    """A caption that leaves space for its end token and one zero, or the empty one."""
    if random.random() < EMPTY_SHARE:
        return ""
    words = caption(clip, random)
    while len(text.tokenizer(words).input_ids) >= TOKENS:
        words = caption(clip, random, plain=True)
    return words


def train_video_text(text: VideoText, caption_parser: VideoCaptionParser, run: VideoTrainingRun) -> None:
    """Train the encoder to parse captions, which needs no videos and is a hundred times cheaper."""
    learner = Learner({"encoder": text.encoder, "caption_parser": caption_parser})
    learner.resume(run.folder / "video-text.safetensors")
    progress = _Progress("video text", learner, run)
    for batch in video_batches(None, text, run, learner.steps_done):
        with torch.autocast("cpu", torch.bfloat16):
            context, counts = text.encode(batch.captions)
        asked = torch.tensor([bool(words) for words in batch.captions])
        answers = attribute_labels(batch.clips)[asked]
        logits = caption_parser(context.float()[asked], counts[asked])
        parts = [nn.functional.cross_entropy(guess, answers[:, index]) for index, guess in enumerate(logits)]
        progress.show(
            learner.learn(torch.stack(parts).sum(), 2 * learning_rate(learner.steps_done, run.steps))
        )
    learner.load_average()


@torch.no_grad()
def parse_accuracy(text: VideoText, caption_parser: VideoCaptionParser, clips: list[Clip]) -> Tensor:
    """Share of these clips' captions from which each attribute is predicted right, (5)."""
    context, counts = text.encode([caption(clip, Random(clip.seed), plain=True) for clip in clips])
    guesses = torch.stack([logits.argmax(1) for logits in caption_parser(context, counts)], 1)
    return (guesses == attribute_labels(clips)).float().mean(0)


def train_video_flow(
    text: VideoText, flow: VideoFlow, pool: npt.NDArray[np.float16], run: VideoTrainingRun
) -> None:
    """Rectified flow on the pool: predict noise - video from any mixture; the text encoder stays fixed."""
    learner = Learner({"transformer": flow.transformer})
    learner.resume(run.folder / "video-flow.safetensors")
    progress = _Progress("video flow", learner, run)
    for batch in video_batches(pool, text, run, learner.steps_done):
        count = len(batch.clips)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            context, counts = text.encode(batch.captions)
        time = video_times(count, batch.random)
        noise = torch.randn(batch.latents.shape, generator=batch.random)
        mixed = torch.lerp(batch.latents, noise, time[:, None, None, None, None])
        velocity = flow(mixed, context.float(), padding_logits(counts, batch.random), time)
        error = (velocity - (noise - batch.latents)).square() * batch.weights
        rate = learning_rate(learner.steps_done, run.steps)
        progress.show(learner.learn(error.mean(), rate))


def video_times(count: int, random: torch.Generator) -> Tensor:
    """Noise shares 0..1: more of them near noise, where the layout is decided; 3 % exactly 1."""
    spread = torch.sigmoid(torch.randn(count, generator=random) + 0.6)
    even = torch.rand(count, generator=random)
    choice = torch.rand(count, generator=random)
    return torch.where(choice < 0.03, 1.0, torch.where(choice < 0.7, spread, even))


def padding_logits(counts: Tensor, random: torch.Generator) -> Tensor:
    """What VideoFlow adds to attention logits, (B, 24): each zero stands for its share of those in a request.

    counts: (B), tokens of each caption.
    """
    lengths = torch.tensor(LENGTHS)[torch.randint(len(LENGTHS), counts.shape, generator=random)]
    each = ((lengths - counts) / (TOKENS - counts)).log()
    return torch.where(torch.arange(TOKENS) >= counts[:, None], each[:, None], 0.0)


class _Progress:
    """A progress bar with a running mean of the loss, and checkpoints."""

    def __init__(self, name: str, learner: Learner, run: VideoTrainingRun) -> None:
        self.learner, self.run = learner, run
        self.path = run.folder / f"{name.replace(' ', '-')}.safetensors"
        self.bar = tqdm(total=run.steps, initial=learner.steps_done, desc=name)
        self.loss: float | None = None

    def show(self, loss: float) -> None:
        """Count one step."""
        self.loss = loss if self.loss is None else 0.97 * self.loss + 0.03 * loss
        self.bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
        self.bar.update()
        if self.learner.steps_done % SAVE_EVERY == 0 or self.learner.steps_done == self.run.steps:
            self.learner.save(self.path)
