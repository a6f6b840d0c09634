"""The stages that make tiny-wan: tokenizer, autoencoder, clips, text encoder, transformer, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from transformers import T5Tokenizer

from tools.tiny_models.learner import Learner, load_average
from tools.tiny_models.plan import Plan, Stage
from tools.tiny_models.video import (
    VideoCaptionParser,
    VideoFlow,
    VideoText,
    build_text_encoder,
    build_transformer,
    video_tokenizer,
)
from tools.tiny_models.video_autoencoder import (
    AUTOENCODER_SEED,
    VideoAutoencoder,
    build_autoencoder,
    decibels,
    encode_clips,
    fold_into_encoder,
    pixels,
    start_decoder,
    train_decoder,
)
from tools.tiny_models.video_scenes import draw_clip, render_clip
from tools.tiny_models.video_training import (
    VideoTrainingRun,
    parse_accuracy,
    train_video_flow,
    train_video_text,
)
from tools.tiny_models.vocabulary import lower_case_pieces

VAE_STEPS, TEXT_STEPS, FLOW_STEPS, CLIPS = 1_200, 260, 4_000, 16_000
FLOW_SHIFT = 3.0


def video_vae(plan: Plan) -> None:
    """Compute the encoder, train the decoder."""
    if (plan.work / "video-vae").exists():
        return
    torch.manual_seed(0)
    autoencoder = build_autoencoder()
    videos = pixels(
        [render_clip(draw_clip(AUTOENCODER_SEED - 1 - index)) for index in range(plan.cut(400, 8))]
    )
    start_decoder(autoencoder, videos, fold_into_encoder(autoencoder, videos))
    train_decoder(autoencoder, plan.work, plan.cut(VAE_STEPS), plan.cut(8))
    print(f"video autoencoder: {decibels(autoencoder, range(-plan.cut(32), 0)):.1f} dB")
    autoencoder.save_pretrained(plan.work / "video-vae")


def video_pool(plan: Plan) -> None:
    """Paint and encode the training clips."""
    if not (plan.work / "video-pool.npy").exists():
        np.save(plan.work / "video-pool.npy", encode_clips(_autoencoder(plan), range(plan.cut(CLIPS, 8))))


def video_text(plan: Plan) -> None:
    """Write the tokenizer; train the text encoder to parse."""
    video_tokenizer(plan.cut(5_000, 200)).save_pretrained(plan.work / "video-tokenizer")
    torch.manual_seed(0)
    text, caption_parser = _text(plan), VideoCaptionParser()
    train_video_text(
        text, caption_parser, VideoTrainingRun(plan.work, plan.cut(TEXT_STEPS), plan.cut(128, 4))
    )
    clips = [draw_clip(seed, held_out=True) for seed in range(-plan.cut(500, 8), 0)]
    print(
        "captions parsed:",
        [round(share, 3) for share in parse_accuracy(text, caption_parser, clips).tolist()],
    )


def video_flow(plan: Plan) -> None:
    """Train the transformer."""
    torch.manual_seed(0)
    pool = np.load(plan.work / "video-pool.npy", mmap_mode="r")
    flow = VideoFlow(build_transformer(), compiled=True)
    train_video_flow(
        _trained_text(plan), flow, pool, VideoTrainingRun(plan.work, plan.cut(FLOW_STEPS), plan.cut(48))
    )


def tiny_wan(plan: Plan) -> None:
    """Write tiny-wan."""
    transformer = build_transformer()
    learner = Learner({"transformer": transformer})
    learner.resume(plan.work / "video-flow.safetensors")
    learner.load_average()
    write(_autoencoder(plan), _trained_text(plan), transformer, plan.out / "tiny-wan")


def write(vae: VideoAutoencoder, text: VideoText, transformer: Any, folder: Path) -> None:
    """Save a WanPipeline of these parts in bf16, with the noise scheduler that Wan 2.1 ships with."""
    with torch.no_grad():
        embedding = text.encoder.get_input_embeddings().weight
        for capital, lower in lower_case_pieces(text.tokenizer).items():
            embedding[capital] = embedding[lower]
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=FLOW_SHIFT,
        num_train_timesteps=1000,
    )
    vae.register_to_config(_name_or_path="tiny-wan-vae")  # else the path it was loaded from
    pipeline: Any = WanPipeline(
        tokenizer=text.tokenizer,
        text_encoder=text.encoder.eval(),
        vae=vae.eval(),
        scheduler=scheduler,
        transformer=transformer.eval(),
    )
    pipeline.to(torch.bfloat16).save_pretrained(folder)


def _autoencoder(plan: Plan) -> VideoAutoencoder:
    return AutoencoderKLWan.from_pretrained(plan.work / "video-vae", dtype=torch.float32)


def _text(plan: Plan) -> VideoText:
    tokenizer = T5Tokenizer.from_pretrained(plan.work / "video-tokenizer")
    return VideoText(build_text_encoder(tokenizer), tokenizer)


def _trained_text(plan: Plan) -> VideoText:
    text = _text(plan)
    load_average(plan.work / "video-text.safetensors", encoder=text.encoder)
    return text


STAGES: dict[str, Stage] = {
    "video-vae": video_vae,
    "video-pool": video_pool,
    "video-text": video_text,
    "video-flow": video_flow,
    "tiny-wan": tiny_wan,
}
