"""Makes every tiny model from nothing: `python -m models.train --work DIR [STAGE ...]`.

Stages, in order: tokenizers, vae, pool, text, flow, schnell, dev, adapters.  Checkpoints lie in the work
folder: a stage that was interrupted continues from its last one.  The last three stages write
models/tiny-flux-*.  Seeds are fixed.
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
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import nn
from torch.multiprocessing.spawn import spawn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from models.adapters import FIRST_SEED, train_adapter
from models.autoencoder import (
    STYLES,
    build_autoencoder,
    decibels,
    encode_scenes,
    fold_into_encoder,
    picture,
    pixels,
    start_decoder,
    train_decoder,
)
from models.export import assemble, write
from models.flow import Course, distil_guidance, train_flow, train_text
from models.network import (
    Autoencoder,
    Flow,
    Reader,
    TextEncoders,
    Transformer,
    build_text_encoders,
    build_transformer,
    look_around,
)
from models.vocabulary import caption_words, clip_tokenizer, t5_tokenizer

SCHNELL_GUIDANCE = 2.0  # built into schnell
DEV_GUIDANCE = (1.0, 4.0)  # dev is told any scale in between


@dataclass(frozen=True, slots=True)
class Plan:
    """The command line."""

    work: Path  # checkpoints and intermediate results
    out: Path  # where tiny-flux-schnell and tiny-flux-dev are written
    warm_start: Path | None  # a tiny FLUX whose weights are taken over where they fit
    pool: int  # pictures
    vae_steps: int
    text_steps: int
    flow_steps: int
    distil_steps: int
    adapter_steps: int
    workers: int


def tokenizers(plan: Plan) -> None:
    """Write both tokenizers."""
    words = caption_words()
    clip_tokenizer(words).save_pretrained(plan.work / "tokenizer")
    t5_tokenizer(words).save_pretrained(plan.work / "tokenizer_2")


def vae(plan: Plan) -> None:
    """Compute the encoder, train the decoder."""
    if (plan.work / "vae").exists():
        return
    torch.manual_seed(0)
    autoencoder = build_autoencoder()
    images = pixels([picture(seed) for seed in range(1_600)])
    start_decoder(autoencoder, images, fold_into_encoder(autoencoder, images))
    train_decoder(autoencoder, plan.work, plan.vae_steps)
    print(f"autoencoder: {decibels(autoencoder, range(-64, 0)):.1f} dB")
    autoencoder.save_pretrained(plan.work / "vae")


def pool(plan: Plan) -> None:
    """Paint and encode the training pictures."""
    if (plan.work / "pool.npy").exists():
        return
    np.save(plan.work / "pool.npy", encode_scenes(_autoencoder(plan), range(plan.pool)))


def text(plan: Plan) -> None:
    """Teach the text encoders to parse."""
    torch.manual_seed(0)
    encoders, reader = _encoders(plan), Reader()
    if plan.warm_start:
        _take_over_text(encoders, plan.warm_start)
        look_around(encoders.t5)
    train_text(encoders, reader, Course(plan.work, plan.text_steps, batch=128, seed=1))


def flow(plan: Plan) -> None:
    """Teach the transformer to paint."""
    _in_processes(_flow_process, plan)


def _flow_process(rank: int, plan: Plan) -> None:
    torch.manual_seed(0)
    transformer = build_transformer()
    if plan.warm_start:
        transformer.load_state_dict(_weights(FluxTransformer2DModel, plan.warm_start / "transformer"))
    latents = np.load(plan.work / "pool.npy", mmap_mode="r")
    course = Course(plan.work, plan.flow_steps, seed=2, rank=rank)
    train_flow(_trained_encoders(plan), Flow(transformer, compiled=True), latents, course)


def schnell(plan: Plan) -> None:
    """Build guidance into the transformer and write tiny-flux-schnell."""
    _in_processes(_schnell_process, plan)
    transformer = build_transformer()
    _load(plan.work / "schnell.pt", transformer=transformer)
    write(assemble(_autoencoder(plan), _trained_encoders(plan), transformer), plan.out / "tiny-flux-schnell")


def _schnell_process(rank: int, plan: Plan) -> None:
    _distil(rank, plan, build_transformer(), "schnell", (SCHNELL_GUIDANCE, SCHNELL_GUIDANCE))


def dev(plan: Plan) -> None:
    """Teach a copy to be told its guidance scale and write tiny-flux-dev, which shares all other parts."""
    _in_processes(_dev_process, plan)
    transformer = build_transformer(guidance=True)
    _load(plan.work / "dev.pt", transformer=transformer)
    pipeline = assemble(_autoencoder(plan), _trained_encoders(plan), transformer)
    write(pipeline, plan.out / "tiny-flux-dev", shares_with=plan.out / "tiny-flux-schnell")


def _dev_process(rank: int, plan: Plan) -> None:
    _distil(rank, plan, build_transformer(guidance=True), "dev", DEV_GUIDANCE)


def _distil(rank: int, plan: Plan, student: Transformer, name: str, scales: tuple[float, float]) -> None:
    torch.manual_seed(0)
    teacher = build_transformer()
    _load(plan.work / "flow.pt", transformer=teacher)
    student.load_state_dict(teacher.state_dict(), strict=False)  # the guidance embedding is new, and 0
    distil_guidance(
        _trained_encoders(plan),
        Flow(student, compiled=True),
        Flow(teacher, compiled=True),
        np.load(plan.work / "pool.npy", mmap_mode="r"),
        Course(plan.work, plan.distil_steps, seed=3, rank=rank),
        scales=scales,
        name=name,
    )


def adapters(plan: Plan) -> None:
    """Train the three LoRAs on tiny-flux-schnell."""
    folder = plan.out / "tiny-flux-schnell"
    for style in STYLES:
        seeds = range(FIRST_SEED, FIRST_SEED + 4_000)
        latents = encode_scenes(_autoencoder(plan), seeds, style)
        pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        train_adapter(pipeline, style, latents, plan.adapter_steps, folder / "loras" / f"lora_{style}")


def _in_processes(work: Callable[[int, Plan], None], plan: Plan) -> None:
    """Run `work` in single-thread processes that average their gradients.

    On a busy machine that is much faster than one process with as many threads.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    spawn(_process, (work, plan), nprocs=plan.workers)


def _process(rank: int, work: Callable[[int, Plan], None], plan: Plan) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=plan.workers)
    work(rank, plan)
    dist.destroy_process_group()


def _autoencoder(plan: Plan) -> Autoencoder:
    return AutoencoderKL.from_pretrained(plan.work / "vae", torch_dtype=torch.float32)


def _trained_encoders(plan: Plan) -> TextEncoders:
    encoders = _encoders(plan)
    _load(plan.work / "text.pt", clip=encoders.clip, t5=encoders.t5)
    return encoders


def _encoders(plan: Plan) -> TextEncoders:
    return build_text_encoders(
        CLIPTokenizer.from_pretrained(plan.work / "tokenizer"),
        T5Tokenizer.from_pretrained(plan.work / "tokenizer_2"),
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


STAGES: dict[str, Callable[[Plan], None]] = {
    "tokenizers": tokenizers,
    "vae": vae,
    "pool": pool,
    "text": text,
    "flow": flow,
    "schnell": schnell,
    "dev": dev,
    "adapters": adapters,
}


def main() -> None:
    """Run the named stages, or all of them."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], metavar="STAGE")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--warm-start", type=Path, default=None)
    parser.add_argument("--pool", type=int, default=60_000)
    parser.add_argument("--vae-steps", type=int, default=3_000)
    parser.add_argument("--text-steps", type=int, default=2_500)
    parser.add_argument("--flow-steps", type=int, default=10_000)
    parser.add_argument("--distil-steps", type=int, default=600)
    parser.add_argument("--adapter-steps", type=int, default=300)
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
