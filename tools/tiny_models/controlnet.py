"""ControlNets for the tiny Stable Diffusion 1.5: one follows edges, one depth, one the pose of a figure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from diffusers import ControlNetModel
from torch import Tensor

from tools.tiny_models.autoencoder import linear_encode, pixels
from tools.tiny_models.captions import caption
from tools.tiny_models.control_maps import canny, depth, pose
from tools.tiny_models.flow import Progress, TrainingRun
from tools.tiny_models.learner import learning_rate
from tools.tiny_models.network import Autoencoder
from tools.tiny_models.scenes import (
    COLOURS,
    MIN_CONTRAST,
    SHAPES,
    Picture,
    Scene,
    Thing,
    contrast,
    draw_scene,
    render,
)
from tools.tiny_models.unet import UNet
from tools.tiny_models.unet_training import (
    Conditioner,
    UNetBatch,
    UNetLearner,
    View,
    noised,
    prepare_for_training,
    save_when_due,
)

ControlNet = Any  # ControlNetModel: diffusers declares its models as placeholders without members

ControlKind = Literal["canny", "depth", "pose"]
MAPS: dict[ControlKind, Callable[[Scene], Picture]] = {"canny": canny, "depth": depth, "pose": pose}
FREE_SHARE = 0.6  # of the drawings show one object anywhere, and the caption names only what the map does not
EMPTY_SHARE = 0.1
EMBEDDING_WIDTHS = (8, 24, 48, 64)  # at 128, 64, 32 and 16 px
ANY_SEED = 1_000_000


def build_controlnet(unet: UNet) -> ControlNet:
    """A ControlNetModel that starts as a copy of the UNet's lower half and adds nothing at first."""
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=EMBEDDING_WIDTHS)


def free_scene(random: Random) -> Scene:
    """One object of any size anywhere in the picture; two colours of equal grey have no edge for Canny."""
    shape, colour = random.choice(SHAPES), random.choice(list(COLOURS))
    background = random.choice([name for name in COLOURS if contrast(name, colour) > MIN_CONTRAST])
    side = random.uniform(0.3, 0.65)
    x, y = (random.uniform(side / 2 + 0.03, 0.97 - side / 2) for _ in range(2))
    thing = Thing(shape, colour, side, x, y)
    return Scene(
        random.getrandbits(32), "one", background, (thing,), mentions_background=True, mentions_colour=True
    )


def vague_caption(scene: Scene, random: Random, kind: ControlKind = "canny") -> str:
    """The colours of a scene and neither place nor size; its shape only beside a pose, which has none."""
    noun = random.choice(("shape", "object"))
    if kind == "pose":
        noun = scene.things[0].shape
    return f"a {scene.things[0].colour} {noun} on a {scene.background} background"


def control_batches(
    kind: ControlKind, vae: Autoencoder, run: TrainingRun, start: int
) -> Iterator[tuple[UNetBatch, Tensor]]:
    """Training batches with their control maps (B, 3, 128, 128) in 0..1."""
    for step in range(start, run.steps):
        random = Random(f"{kind}/{run.seed}/{step}")
        scenes, captions = [], []
        for _ in range(run.batch):
            free = random.random() < FREE_SHARE
            scene = free_scene(random) if free else draw_scene(random.randrange(ANY_SEED))
            text = vague_caption(scene, random, kind) if free else caption(scene, random)
            scenes.append(scene)
            captions.append("" if random.random() < EMPTY_SHARE else text)
        pictures = [np.asarray(render(scene)) for scene in scenes]
        with torch.no_grad():
            latents = linear_encode(vae, pixels(pictures))
        maps = (pixels([MAPS[kind](scene) for scene in scenes]) + 1) / 2
        yield noised(latents, scenes, captions, [View()] * run.batch, random), maps


def train_controlnet(
    kind: ControlKind,
    controlnet: ControlNet,
    unet: UNet,
    condition: Conditioner,
    vae: Autoencoder,
    run: TrainingRun,
) -> None:
    """Train the ControlNet; the UNet keeps its weights."""
    for network in (unet, controlnet):
        prepare_for_training(network)
    unet.requires_grad_(False)
    learner = UNetLearner({"controlnet": controlnet})
    learner.resume(run.folder / f"{kind}.safetensors")
    progress = Progress(kind, learner, run)
    for batch, maps in control_batches(kind, vae, run, learner.steps_done):
        with torch.no_grad():
            context, _ = condition(batch)
        noisy = batch.noisy.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            down, middle = controlnet(noisy, batch.times, context, maps, return_dict=False)
            answer = unet(
                noisy,
                batch.times,
                context,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
            ).sample
        rate = learning_rate(learner.steps_done, run.steps)
        progress.show(learner.learn(batch.loss(answer), rate))
        save_when_due(learner, run, kind)
