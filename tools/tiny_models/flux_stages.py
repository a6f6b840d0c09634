"""The stages that make the tiny FLUX: tokenizers, autoencoder, text encoders, transformers, adapters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from tools.tiny_models.adapters import train_adapters
from tools.tiny_models.autoencoder import (
    build_autoencoder,
    decibels,
    encode_scenes,
    fold_into_encoder,
    picture,
    pixels,
    start_decoder,
    train_decoder,
)
from tools.tiny_models.export import assemble, write
from tools.tiny_models.flow import TrainingRun, distil_guidance, train_flow, train_text
from tools.tiny_models.learner import load_average
from tools.tiny_models.network import (
    Autoencoder,
    CaptionParser,
    Flow,
    TextEncoders,
    Transformer,
    build_text_encoders,
    build_transformer,
    with_guidance_built_in,
)
from tools.tiny_models.plan import Plan, Stage, in_processes
from tools.tiny_models.vocabulary import caption_words, clip_tokenizer, t5_tokenizer

SCHNELL_GUIDANCE = (1.5, 1.5)  # built into schnell; more and colours overshoot
DEV_GUIDANCE = (1.0, 5.0)  # dev takes any scale in between


def tokenizers(plan: Plan) -> None:
    """Write both tokenizers."""
    words = caption_words(plan.cut(20_000, 200))
    clip_tokenizer(words).save_pretrained(plan.work / "tokenizer")
    t5_tokenizer(words).save_pretrained(plan.work / "tokenizer_2")


def vae(plan: Plan) -> None:
    """Compute the encoder and train the decoder, or take both over."""
    if (plan.work / "vae").exists():
        return
    if plan.warm_start:
        shutil.copytree(plan.warm_start / "vae", plan.work / "vae")
        return
    torch.manual_seed(0)
    autoencoder = build_autoencoder()
    images = pixels([picture(seed) for seed in range(plan.cut(1_600, 8))])
    start_decoder(autoencoder, images, fold_into_encoder(autoencoder, images))
    train_decoder(autoencoder, plan.work, plan.vae_steps, plan.cut(9_000, 4))
    print(f"autoencoder: {decibels(autoencoder, range(9_000, 9_000 + plan.cut(64))):.1f} dB")
    autoencoder.save_pretrained(plan.work / "vae")


def pool(plan: Plan) -> None:
    """Paint and encode the training pictures."""
    if (plan.work / "pool.npy").exists():
        return
    np.save(plan.work / "pool.npy", encode_scenes(_autoencoder(plan), range(plan.pool)))


def text(plan: Plan) -> None:
    """Train the text encoders to parse."""
    torch.manual_seed(0)
    encoders, caption_parser = _encoders(plan), CaptionParser()
    if plan.warm_start:
        copy_text_weights(encoders, plan.warm_start)
    rate = 1.0 if plan.warm_start else 2.0
    train_text(
        encoders,
        caption_parser,
        TrainingRun(plan.work, plan.text_steps, batch=plan.cut(128, 4), seed=1),
        rate,
    )


def flow(plan: Plan) -> None:
    """Train the transformer."""
    in_processes(_flow_process, plan)


def _flow_process(rank: int, plan: Plan) -> None:
    torch.manual_seed(0)
    transformer = unguided(plan.warm_start) if plan.warm_start else build_transformer()
    run = TrainingRun(plan.work, plan.flow_steps, batch=plan.cut(64), seed=2, rank=rank)
    train_flow(_trained_encoders(plan), Flow(transformer, compiled=True), _pool(plan), run)


def unguided(source: Path) -> Transformer:
    """Another tiny FLUX's transformer; one with a guidance embedding as it is at scale 1."""
    state = _weights(FluxTransformer2DModel, source / "transformer")
    takes_guidance = any(".guidance_embedder." in name for name in state)
    transformer = build_transformer(guidance=takes_guidance)
    transformer.load_state_dict(state)
    return with_guidance_built_in(transformer, 1.0) if takes_guidance else transformer


def dev(plan: Plan) -> None:
    """Train the transformer to take its guidance scale as an input, and write tiny-flux-dev.

    Everything but the transformer is linked to tiny-flux-schnell, which the next stage writes.
    """
    in_processes(_dev_process, plan)
    pipeline = assemble(_autoencoder(plan), _trained_encoders(plan), _trained_dev(plan))
    write(pipeline, plan.out / "tiny-flux-dev", shares_with=plan.out / "tiny-flux-schnell")


def _dev_process(rank: int, plan: Plan) -> None:
    torch.manual_seed(0)
    teacher, student = build_transformer(), build_transformer(guidance=True)
    load_average(plan.work / "flow.safetensors", transformer=teacher)
    student.load_state_dict(teacher.state_dict(), strict=False)  # the guidance embedding is new, and 0
    distil_guidance(
        _trained_encoders(plan),
        Flow(student, compiled=True),
        Flow(teacher, compiled=True),
        _pool(plan),
        TrainingRun(plan.work, plan.distil_steps, batch=plan.cut(64), seed=3, rank=rank),
        DEV_GUIDANCE,
        "dev",
    )


def _trained_dev(plan: Plan) -> Transformer:
    transformer = build_transformer(guidance=True)
    load_average(plan.work / "dev.safetensors", transformer=transformer)
    return transformer


def schnell(plan: Plan) -> None:
    """Build one guidance into a copy of the flow, at the times of four steps, and write tiny-flux-schnell."""
    in_processes(_schnell_process, plan)
    transformer = build_transformer()
    load_average(plan.work / "schnell.safetensors", transformer=transformer)
    write(assemble(_autoencoder(plan), _trained_encoders(plan), transformer), plan.out / "tiny-flux-schnell")


def _schnell_process(rank: int, plan: Plan) -> None:
    teacher, student = build_transformer(), build_transformer()
    load_average(plan.work / "flow.safetensors", transformer=teacher)
    student.load_state_dict(teacher.state_dict())
    distil_guidance(
        _trained_encoders(plan),
        Flow(student, compiled=True),
        Flow(teacher, compiled=True),
        _pool(plan),
        TrainingRun(plan.work, plan.distil_steps, batch=plan.cut(64), seed=4, rank=rank),
        SCHNELL_GUIDANCE,
        "schnell",
    )


def adapters(plan: Plan) -> None:
    """Train the three LoRAs of tiny-flux-schnell, on the flow behind it: no guidance is built in there.

    Trained on schnell itself they were no better, and outlines came out broken.
    """
    transformer = build_transformer()
    load_average(plan.work / "flow.safetensors", transformer=transformer)
    pipeline = assemble(_autoencoder(plan), _trained_encoders(plan), transformer)
    folder = plan.out / "tiny-flux-schnell" / "loras"
    train_adapters(pipeline, _autoencoder(plan), folder, plan.adapter_steps, plan.cut(2_000, 4))


def _autoencoder(plan: Plan) -> Autoencoder:
    return AutoencoderKL.from_pretrained(plan.work / "vae", torch_dtype=torch.float32)


def _pool(plan: Plan) -> npt.NDArray[np.float16]:
    latents: npt.NDArray[np.float16] = np.load(plan.work / "pool.npy", mmap_mode="r")
    return latents


def _trained_encoders(plan: Plan) -> TextEncoders:
    encoders = _encoders(plan)
    load_average(plan.work / "text.safetensors", clip=encoders.clip, t5=encoders.t5)
    return encoders


def _encoders(plan: Plan) -> TextEncoders:
    return build_text_encoders(
        CLIPTokenizer.from_pretrained(plan.work / "tokenizer"),
        T5Tokenizer.from_pretrained(plan.work / "tokenizer_2"),
    )


def _weights(kind: Any, folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = kind.from_pretrained(folder, dtype=torch.float32).state_dict()
    return state


def copy_text_weights(encoders: TextEncoders, source: Path) -> None:
    """Start from another tiny FLUX: embeddings by piece, layers by name; new T5 layers start as identity."""
    pairs: list[tuple[nn.Module, Any, Any, str, Any]] = [
        (encoders.clip, CLIPTextModel, encoders.clip_tokenizer, "text_encoder", CLIPTokenizer),
        (encoders.t5, T5EncoderModel, encoders.t5_tokenizer, "text_encoder_2", T5Tokenizer),
    ]
    for module, kind, tokenizer, folder, tokenizer_kind in pairs:
        theirs = _weights(kind, source / folder)
        their_tokenizer = tokenizer_kind.from_pretrained(source / folder.replace("text_encoder", "tokenizer"))
        their_pieces = their_tokenizer.get_vocab()
        with torch.no_grad():
            for name, weight in module.state_dict().items():
                if name not in theirs:
                    if name.endswith((".o.weight", ".wo.weight")):
                        weight.zero_()
                elif weight.shape == theirs[name].shape:
                    weight.copy_(theirs[name])
                else:
                    for piece, row in tokenizer.get_vocab().items():
                        if piece in their_pieces:
                            weight[row] = theirs[name][their_pieces[piece]]


STAGES: dict[str, Stage] = {
    "tokenizers": tokenizers,
    "vae": vae,
    "pool": pool,
    "text": text,
    "flow": flow,
    "dev": dev,
    "schnell": schnell,
    "adapters": adapters,
}
