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

from tools.tiny_models.autoencoder import encode_scenes
from tools.tiny_models.captions import caption
from tools.tiny_models.flow import LONG, LONG_SHARE, SHORT, layout_noise
from tools.tiny_models.learner import Learner, learning_rate
from tools.tiny_models.network import Autoencoder, Flow, Pipeline, TextEncoders, Transformer, pack
from tools.tiny_models.scenes import Style, draw_scene

ORDER: tuple[Style, ...] = ("night", "mosaic", "outline")
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


def train_adapters(pipeline: Pipeline, vae: Autoencoder, folder: Path, steps: int, pictures: int) -> None:
    """Train night, mosaic and outline on the pipeline, in fp32, from so many pictures per style; those in
    `folder` are done.

    In a third of its steps an adapter works on top of an earlier one, so that any two fit together.  Outline
    changes what is drawn, not how: it is trained three times as long.
    """
    pipeline.transformer.requires_grad_(False)
    flow = Flow(pipeline.transformer)
    seeds = range(FIRST_SEED, FIRST_SEED + pictures)
    for index, style in enumerate(ORDER):
        saved = folder / f"lora_{style}"
        if saved.exists():
            pipeline.load_lora_weights(saved, adapter_name=style)
            continue
        sets = [(style,), *((style, partner) for partner in ORDER[:index])]
        latents = {names: encode_scenes(vae, seeds, *names) for names in sets}
        _train_adapter(pipeline, flow, latents, 3 * steps if style == "outline" else steps)
        trained = get_peft_model_state_dict(pipeline.transformer, adapter_name=style)
        FluxPipeline.save_lora_weights(saved, transformer_lora_layers=_half(trained))


def _train_adapter(
    pipeline: Pipeline, flow: Flow, latents: dict[tuple[Style, ...], npt.NDArray[np.float16]], steps: int
) -> None:
    """Add an adapter to the pipeline's transformer and train it; earlier ones stay as they are.

    latents: (N, 16, 16, 16), the scenes of seeds FIRST_SEED on, in this adapter's style, then in this and
    another one.
    """
    encoders = TextEncoders(
        pipeline.text_encoder, pipeline.text_encoder_2, pipeline.tokenizer, pipeline.tokenizer_2
    )
    transformer = pipeline.transformer
    (style, *_), *_ = alone, *together = list(latents)
    torch.manual_seed(0)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS)
    transformer.add_adapter(lora, adapter_name=style)
    _activate(transformer, style)
    learner = Learner({"adapter": transformer}, average_decay=0.98)
    for step in tqdm(range(steps), desc=style):
        random = Random(f"{style}/{step}")
        generator = torch.Generator().manual_seed(step)
        names = random.choice(together) if together and step % 3 == 2 else alone
        _activate(transformer, *names)
        picks = [random.randrange(len(latents[names])) for _ in range(min(32, len(latents[names])))]
        scenes = [draw_scene(FIRST_SEED + pick) for pick in picks]
        captions = [_styled(caption(scene, random, plain=True), style, random) for scene in scenes]
        picture = pack(torch.from_numpy(latents[names][picks].astype(np.float32)))
        with torch.no_grad():
            pooled, context = encoders.encode(captions, LONG if random.random() < LONG_SHARE else SHORT)
        four = 0.25 * torch.randint(1, 5, (len(picks),), generator=generator)
        spread = torch.rand(len(picks), generator=generator)
        time = torch.where(torch.rand(len(picks), generator=generator) < 0.5, four, spread)
        variation = torch.tensor([scene.variation for scene in scenes])
        noise = layout_noise(variation, time, generator)
        velocity = flow(torch.lerp(picture, noise, time[:, None, None]), pooled, context, time)
        loss = (velocity - (noise - picture)).square().mean()
        learner.learn(loss, 3 * learning_rate(step, steps, warm_up=10, cool_down=0.9))
    learner.load_average()


def _activate(transformer: Transformer, trained: Style, *others: Style) -> None:
    """Switch on these adapters only; just the first one learns."""
    transformer.set_adapters([trained, *others])
    for name, weight in transformer.named_parameters():
        if "lora_" in name:
            weight.requires_grad_(f".{trained}." in name)


def _styled(text: str, style: Style, random: Random) -> str:
    """The caption, in half of the cases with the trigger word in front or behind."""
    if random.random() > TRIGGER_SHARE:
        return text
    return random.choice((f"{text}, {TRIGGERS[style]}", f"{TRIGGERS[style]} {text}"))


def _half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.bfloat16().contiguous() for name, weight in state.items()}
