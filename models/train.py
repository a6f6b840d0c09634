"""Makes every tiny model from nothing: `python -m models.train --work DIR [STAGE ...]`.

Stages, in order: tokenizers, vae, pool, text, flow, schnell, dev, adapters.  Each leaves its result in the work folder;
a stage that was interrupted continues from its last checkpoint, a finished one only loads.  Seeds are fixed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from models.autoencoder import encode_scenes
from models.flow import Course, train_flow, train_text
from models.network import Flow, Reader, TextEncoders, build_text_encoders, build_transformer
from models.vocabulary import caption_words, clip_tokenizer, t5_tokenizer

REPOSITORY = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Plan:
    """The command line."""

    work: Path  # checkpoints and intermediate results
    warm_start: Path | None  # a tiny FLUX whose weights are taken over where they fit
    pool: int  # pictures
    text_steps: int
    flow_steps: int
    distil_steps: int
    workers: int


def tokenizers(plan: Plan) -> None:
    """Write both tokenizers."""
    words = caption_words()
    clip_tokenizer(words).save_pretrained(plan.work / "tokenizer")
    t5_tokenizer(words).save_pretrained(plan.work / "tokenizer_2")


def pool(plan: Plan) -> None:
    """Paint and encode the training pictures."""
    if (plan.work / "pool.npy").exists():
        return
    vae = AutoencoderKL.from_pretrained(plan.work / "vae", torch_dtype=torch.float32)
    np.save(plan.work / "pool.npy", encode_scenes(vae, range(plan.pool)))


def text(plan: Plan) -> None:
    """Teach the text encoders to parse."""
    torch.manual_seed(0)
    encoders, reader = _encoders(plan), Reader()
    if plan.warm_start:
        _take_over_text(encoders, plan.warm_start)
    train_text(encoders, reader, Course(plan.work, plan.text_steps, batch=128, seed=1))


def flow(plan: Plan) -> None:
    """Teach everything to paint."""
    _in_processes(_flow_process, plan)


def _flow_process(rank: int, plan: Plan) -> None:
    torch.manual_seed(0)
    encoders, reader, transformer = _encoders(plan), Reader(), build_transformer()
    if plan.warm_start:
        transformer.load_state_dict(_weights(FluxTransformer2DModel, plan.warm_start / "transformer"))
    _load(plan.work / "text.pt", clip=encoders.clip, t5=encoders.t5, reader=reader)
    latents = np.load(plan.work / "pool.npy", mmap_mode="r")
    course = Course(plan.work, plan.flow_steps, seed=2, rank=rank)
    train_flow(encoders, reader, Flow(transformer, compiled=True), latents, course)


def _in_processes(work: Callable[[int, Plan], None], plan: Plan) -> None:
    """Run `work` in single-thread processes that average their gradients.

    On a busy machine that is much faster than one process with as many threads.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    processes.spawn(_process, (work, plan), nprocs=plan.workers)


def _process(rank: int, work: Callable[[int, Plan], None], plan: Plan) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=plan.workers)
    work(rank, plan)
    dist.destroy_process_group()


def _encoders(plan: Plan) -> TextEncoders:
    return build_text_encoders(
        CLIPTokenizer.from_pretrained(plan.work / "tokenizer"),
        T5TokenizerFast.from_pretrained(plan.work / "tokenizer_2"),
    )


def _load(checkpoint: Path, **modules: nn.Module) -> None:
    """Put a checkpoint's running average into the modules."""
    average = torch.load(checkpoint, weights_only=True)["average"]
    with torch.no_grad():
        for prefix, module in modules.items():
            for name, weight in module.named_parameters():
                weight.copy_(average[f"{prefix}.{name}"])


def _weights(kind: Any, folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = kind.from_pretrained(folder, dtype=torch.float32).state_dict()
    return state


def _take_over_text(encoders: TextEncoders, source: Path) -> None:
    """Start from another tiny FLUX: embeddings by piece, layers by name; additional T5 layers start as identity."""
    pairs: list[tuple[nn.Module, Any, Any, str, Any]] = [
        (encoders.clip, CLIPTextModel, encoders.clip_tokenizer, "text_encoder", CLIPTokenizer),
        (encoders.t5, T5EncoderModel, encoders.t5_tokenizer, "text_encoder_2", T5TokenizerFast),
    ]
    for module, kind, tokenizer, folder, tokenizer_kind in pairs:
        theirs = _weights(kind, source / folder)
        their_pieces = tokenizer_kind.from_pretrained(source / folder.replace("text_encoder", "tokenizer")).get_vocab()
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


STAGES: dict[str, Callable[[Plan], None]] = {
    "tokenizers": tokenizers,
    "pool": pool,
    "text": text,
    "flow": flow,
}


def main() -> None:
    """Run the named stages, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], metavar="STAGE")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--warm-start", type=Path, default=None)
    parser.add_argument("--pool", type=int, default=40_000)
    parser.add_argument("--text-steps", type=int, default=4_000)
    parser.add_argument("--flow-steps", type=int, default=8_000)
    parser.add_argument("--distil-steps", type=int, default=800)
    parser.add_argument("--workers", type=int, default=2)
    options = vars(parser.parse_args())
    stages = options.pop("stages") or list(STAGES)
    plan = Plan(**options)
    plan.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for stage in stages:
        STAGES[stage](plan)


if __name__ == "__main__":
    main()
