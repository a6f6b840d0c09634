"""The stages that make the tiny editing model, a FLUX.1 Kontext: pairs of drawings, then the transformer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, FluxKontextPipeline
from transformers import CLIPTokenizer, T5Tokenizer

from tools.tiny_models.edit_training import EditFlow, build_edit_transformer, encode_edits, train_edits
from tools.tiny_models.edits import edit_words
from tools.tiny_models.export import assemble, write
from tools.tiny_models.flow import TrainingRun
from tools.tiny_models.flux_stages import copy_text_weights, unguided
from tools.tiny_models.learner import load_average
from tools.tiny_models.network import TextEncoders, Transformer, build_text_encoders
from tools.tiny_models.plan import Plan, Stage, in_processes
from tools.tiny_models.vocabulary import clip_tokenizer, t5_tokenizer

SHARED = ("vae", "scheduler")  # with tiny-flux-schnell


def edit_tokenizers(plan: Plan) -> None:
    """Write both tokenizers: the words of captions, then those of instructions."""
    words = edit_words(plan.cut(20_000, 200))
    clip_tokenizer(words).save_pretrained(plan.work / "edit" / "tokenizer")
    t5_tokenizer(words).save_pretrained(plan.work / "edit" / "tokenizer_2")


def edit_pool(plan: Plan) -> None:
    """Paint and encode the training pairs."""
    if not (path := plan.work / "edit_pool.npy").exists():
        vae = AutoencoderKL.from_pretrained(_base(plan) / "vae", torch_dtype=torch.float32)
        np.save(path, encode_edits(vae, range(plan.cut(plan.edit_pairs))))


def edit(plan: Plan) -> None:
    """Train transformer and text encoders, and write tiny-flux-kontext."""
    in_processes(_edit_process, plan)
    export_edit(plan)


def export_edit(plan: Plan) -> None:
    """Write tiny-flux-kontext from the last checkpoint."""
    transformer, encoders = _untrained(plan)
    load_average(plan.work / "edit.safetensors", transformer=transformer, clip=encoders.clip, t5=encoders.t5)
    vae = AutoencoderKL.from_pretrained(_base(plan) / "vae", torch_dtype=torch.float32)
    pipeline = FluxKontextPipeline(**assemble(vae, encoders, transformer).components)
    write(pipeline, plan.out / "tiny-flux-kontext", shares_with=plan.out / "tiny-flux-schnell", parts=SHARED)


def _edit_process(rank: int, plan: Plan) -> None:
    torch.manual_seed(0)
    transformer, encoders = _untrained(plan)
    run = TrainingRun(plan.work, plan.edit_steps, batch=plan.cut(plan.edit_batch), seed=5, rank=rank)
    train_edits(encoders, EditFlow(transformer, compiled=True), _pairs(plan), run)


def _untrained(plan: Plan) -> tuple[Transformer, TextEncoders]:
    """What training starts from: the tiny FLUX without guidance, and its text encoders with more words."""
    folder = plan.work / "edit"
    encoders = build_text_encoders(
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        T5Tokenizer.from_pretrained(folder / "tokenizer_2"),
    )
    copy_text_weights(encoders, _base(plan))
    return build_edit_transformer(unguided(_base(plan))), encoders


def _base(plan: Plan) -> Path:
    """The tiny FLUX whose weights are taken over."""
    return plan.warm_start or plan.out / "tiny-flux-dev"


def _pairs(plan: Plan) -> npt.NDArray[np.float16]:
    latents: npt.NDArray[np.float16] = np.load(plan.work / "edit_pool.npy", mmap_mode="r")
    return latents


STAGES: dict[str, Stage] = {
    "edit-tokenizers": edit_tokenizers,
    "edit-pool": edit_pool,
    "edit": edit,
    "edit-export": export_edit,
}
