"""Writes trained weights as FluxPipeline directories that diffusers loads like the real ones."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from tools.tiny_models.network import Autoencoder, Pipeline, TextEncoders, Transformer
from tools.tiny_models.vocabulary import lower_case_pieces

SHARED_PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


def assemble(vae: Autoencoder, encoders: TextEncoders, transformer: Transformer) -> Pipeline:
    """The pipeline of these parts, with schnell's noise scheduler (shift 1)."""
    with torch.no_grad():
        embedding = encoders.t5.get_input_embeddings().weight
        for capital, lower in lower_case_pieces(encoders.t5_tokenizer).items():
            embedding[capital] = embedding[lower]
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae.eval(),
        text_encoder=encoders.clip.eval(),
        tokenizer=encoders.clip_tokenizer,
        text_encoder_2=encoders.t5.eval(),
        tokenizer_2=encoders.t5_tokenizer,
        transformer=transformer.eval(),
    )


def write(
    pipeline: Pipeline,
    folder: Path,
    *,
    shares_with: Path | None = None,
    parts: Sequence[str] = SHARED_PARTS,
) -> None:
    """Save in bf16; parts that `shares_with` (a sibling folder) already holds are links to it, not copies."""
    for part in parts:
        if (folder / part).is_symlink():  # an older model's link would be written through
            (folder / part).unlink()
    pipeline.vae.register_to_config(_name_or_path="tiny-flux-vae")  # else the path it was loaded from
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    if shares_with is None:
        return
    for part in parts:
        shutil.rmtree(folder / part)
        (folder / part).symlink_to(Path("..") / shares_with.name / part)
