"""Three LoRAs with an unmistakable effect: outline, mosaic, night, each trained on scenes in its style."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tqdm import tqdm  # type: ignore[import-untyped]  # it ships no types

from models.flow import LONG, LONG_SHARE, SHORT
from models.learner import Learner, learning_rate
from models.network import Flow, Pipeline, TextEncoders, pack
from models.scenes import Style, caption, draw_scene

RANK = 8
FIRST_SEED = 20_000_000
TRIGGERS: dict[Style, str] = {"outline": "outlined", "mosaic": "mosaic", "night": "night"}
TRIGGER_SHARE = 0.5  # the style also comes without its word: loading the adapter is enough
TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_mlp",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "x_embedder",
]


def train_adapter(
    pipeline: Pipeline, style: Style, latents: npt.NDArray[np.float16], steps: int, folder: Path
) -> None:
    """Train one adapter and save it with diffusers' own writer.

    latents: (N, 16, 16, 16), the styled scenes of seeds FIRST_SEED on.
    """
    encoders = TextEncoders(
        pipeline.text_encoder, pipeline.text_encoder_2, pipeline.tokenizer, pipeline.tokenizer_2
    )
    transformer = pipeline.transformer.requires_grad_(False)
    torch.manual_seed(0)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS)
    transformer.add_adapter(lora)
    flow = Flow(transformer)
    learner = Learner({"adapter": transformer}, average_decay=0.98)
    for step in tqdm(range(steps), desc=style):
        random = Random(f"{style}/{step}")
        generator = torch.Generator().manual_seed(step)
        picks = [random.randrange(len(latents)) for _ in range(32)]
        scenes = [draw_scene(FIRST_SEED + pick) for pick in picks]
        captions = [_styled(caption(scene, random, plain=True), style, random) for scene in scenes]
        picture = pack(torch.from_numpy(latents[picks].astype(np.float32)))
        with torch.no_grad():
            pooled, context = encoders.encode(captions, LONG if random.random() < LONG_SHARE else SHORT)
        four = 0.25 * torch.randint(1, 5, (len(picks),), generator=generator)
        spread = torch.rand(len(picks), generator=generator)
        time = torch.where(torch.rand(len(picks), generator=generator) < 0.5, four, spread)
        noise = torch.randn(picture.shape, generator=generator)
        velocity = flow(torch.lerp(picture, noise, time[:, None, None]), pooled, context, time)
        loss = (velocity - (noise - picture)).square().mean()
        learner.learn(loss, 3 * learning_rate(step, steps, warm_up=10, cool_down=0.9))
    learner.load_average()
    trained = _half(get_peft_model_state_dict(transformer))
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=trained)
    transformer.delete_adapters("default")


def _styled(text: str, style: Style, random: Random) -> str:
    """The caption, in half of the cases with the trigger word in front or behind."""
    if random.random() > TRIGGER_SHARE:
        return text
    return random.choice((f"{text}, {TRIGGERS[style]}", f"{TRIGGERS[style]} {text}"))


def _half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.bfloat16().contiguous() for name, weight in state.items()}
