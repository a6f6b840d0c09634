"""The shipped tiny Wan follows prompts, and its parts do what its training took them to do."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5EncoderModel

from deployments.models.load import load_pipeline
from deployments.protocol.card import load_card
from tools.tiny_models.video import TOKENS, VideoFlow, VideoText
from tools.tiny_models.video_autoencoder import LinearEncoder, decibels, decode_at_once, pixels
from tools.tiny_models.video_scenes import (
    FRAMES,
    VIDEO_PX,
    Frames,
    caption,
    coverage,
    draw_clip,
    is_held_out,
    render_clip,
)
from tools.tiny_models.video_score import generate_clips, held_out_clips, score_clip, video_accuracy
from tools.tiny_models.video_training import padding_logits

ROOT = Path(__file__).parents[2]
CARD = load_card(ROOT / "configs/models/tiny-wan.yaml")
STEPS = CARD.steps.default
BACKGROUND, COLOUR, MOTION, WHOLE = (
    95.0,
    90.0,
    90.0,
    80.0,
)  # per cent, of 20 prompts; the card has those of 200
PIXELS_DB = 24.0


@pytest.fixture(scope="module")
def wan() -> Any:
    pipeline = load_pipeline(CARD.weights, torch.device("cpu"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def filmed(wan: Any, *prompts: str, seed: int = 0, guidance: float = CARD.guidance.default) -> list[Frames]:
    return generate_clips(wan, list(prompts), STEPS, seed, guidance_scale=guidance)


def difference(a: Frames, b: Frames) -> float:
    """Mean absolute difference of the pixels, 0..255."""
    return float(np.abs(a.astype(np.float32) - b).mean())


# --- the drawings -----------------------------------------------------------------------------------------


def test_true_renderings_are_wholly_right() -> None:
    clips = [clip for _, clip in islice(held_out_clips(), 24)]

    right = video_accuracy([render_clip(clip) for clip in clips], clips)

    assert set(right.values()) == {100.0}


def test_a_wrong_motion_colour_or_shape_is_seen() -> None:
    (_, clip), *others = islice(held_out_clips(), 12)
    frames = render_clip(clip)

    for _, other in others:
        score = score_clip(frames, other)
        assert score.motion == (clip.motion == other.motion)
        assert score.colour == (clip.colour == other.colour)
        assert score.shape == (clip.shape == other.shape)


def test_training_never_sees_what_is_held_out() -> None:
    assert not any(is_held_out(draw_clip(seed)) for seed in range(300))
    assert all(is_held_out(clip) for _, clip in islice(held_out_clips(), 100))


def test_a_seed_is_always_the_same_clip() -> None:
    assert draw_clip(3) == draw_clip(3)
    assert np.array_equal(render_clip(draw_clip(3)), render_clip(draw_clip(3)))
    assert render_clip(draw_clip(3)).shape == (FRAMES, VIDEO_PX, VIDEO_PX, 3)


def test_the_cover_holds_every_pixel_of_the_object() -> None:
    for seed in range(20):
        clip = draw_clip(seed)
        frames = render_clip(clip).astype(np.float32)
        objects = np.abs(frames - frames[:, :1, :1]).max(-1) > 60
        covered = coverage(clip).repeat(8, 1).repeat(8, 2)[(np.arange(FRAMES) + 3) // 4]

        assert not (objects & ~covered).any()


# --- the parts --------------------------------------------------------------------------------------------


def test_the_pipeline_is_made_of_the_real_classes(wan: Any) -> None:
    assert type(wan) is WanPipeline
    assert type(wan.vae) is AutoencoderKLWan
    assert type(wan.text_encoder) is UMT5EncoderModel
    assert type(wan.tokenizer) is T5Tokenizer
    assert type(wan.transformer) is WanTransformer3DModel
    assert (wan.vae_scale_factor_spatial, wan.vae_scale_factor_temporal) == (8, 4)


def test_no_file_holds_the_path_where_it_was_made() -> None:
    folder = ROOT / str(CARD.weights.path)

    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        assert not str(config.get("_name_or_path", "")).startswith("/")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 10e6


@pytest.fixture(scope="module")
def videos() -> torch.Tensor:
    return pixels([render_clip(draw_clip(seed)) for seed in range(-4, 0)])


@torch.no_grad()
def test_the_computed_encoder_is_nearly_linear_and_its_latents_have_unit_size(
    wan: Any, videos: torch.Tensor
) -> None:
    latents = wan.vae.encode(videos).latent_dist.mean

    assert latents.shape == (4, 16, 5, 8, 8)
    assert (latents - LinearEncoder(wan.vae)(videos)).abs().max() < 0.1
    assert 0.7 < latents.std() < 1.3


@torch.no_grad()
def test_decoding_all_frames_at_once_is_decoding_chunk_by_chunk(wan: Any) -> None:
    latents = torch.randn(2, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))

    by_chunks = wan.vae.decode(latents).sample

    assert torch.allclose(decode_at_once(wan.vae, latents).clamp(-1, 1), by_chunks, atol=1e-4)


def test_the_autoencoder_keeps_clips(wan: Any) -> None:
    assert decibels(wan.vae, range(-8, 0)) > PIXELS_DB


@torch.no_grad()
def test_the_training_forward_is_the_transformers_own_at_any_padding(wan: Any) -> None:
    text = VideoText(wan.text_encoder, wan.tokenizer)
    prompts = ["a red circle moving left", "", "a blue star growing on a white background"]
    generator = torch.Generator().manual_seed(0)
    latents, time = torch.randn(3, 16, 5, 8, 8, generator=generator), torch.tensor([1.0, 0.5, 0.2])
    for length in (32, 226):
        padded, _ = text.encode(prompts, length)
        context, counts = text.encode(prompts)
        each = ((length - counts) / (TOKENS - counts)).log()
        padding = torch.where(torch.arange(TOKENS) >= counts[:, None], each[:, None], 0.0)

        own = wan.transformer(latents, 1000 * time, padded, return_dict=False)[0]

        assert (VideoFlow(wan.transformer)(latents, context, padding, time) - own).abs().mean() < 0.03


def test_padding_stands_for_the_zeros_of_a_request() -> None:
    counts = torch.tensor([3, 10])

    logits = padding_logits(counts, torch.Generator().manual_seed(0))

    stands_for = (logits.exp() * (torch.arange(TOKENS) >= counts[:, None])).sum(1) + counts
    assert all(any(abs(total - length) < 0.1 for length in (32, 64, 128, 226, 512)) for total in stands_for)


def test_every_caption_is_read_in_whole_words(wan: Any) -> None:
    for seed in range(200):
        pieces = wan.tokenizer.tokenize(caption(draw_clip(seed), Random(seed), plain=True))
        assert all(piece.startswith("▁") or not piece.isalpha() for piece in pieces)


# --- prompts ----------------------------------------------------------------------------------------------


def test_held_out_prompts_are_followed(wan: Any) -> None:
    prompts, clips = zip(*islice(held_out_clips(), 20), strict=True)

    right = video_accuracy(filmed(wan, *prompts), list(clips))

    assert right["background"] >= BACKGROUND
    assert right["colour"] >= COLOUR
    assert right["motion"] >= MOTION
    assert right["whole"] >= WHOLE


def test_capitals_do_not_matter(wan: Any) -> None:
    text = VideoText(wan.text_encoder, wan.tokenizer)

    (small, capital), _ = text.encode(["a blue square moving right", "A Blue Square MOVING Right"])

    assert torch.equal(small, capital)


def test_a_seed_repeats_its_video_and_another_changes_it(wan: Any) -> None:
    prompt = "a green heart moving up on a yellow background"
    first, again, other = (filmed(wan, prompt, seed=seed)[0] for seed in (1, 1, 2))

    assert difference(first, again) == 0
    assert difference(first, other) > 0.5


def test_guidance_acts(wan: Any) -> None:
    prompt = "a purple star moving down on a cyan background"
    without, guided = (filmed(wan, prompt, guidance=scale)[0] for scale in (1.0, CARD.guidance.default))

    assert difference(without, guided) > 0.3


def test_a_negative_prompt_acts(wan: Any) -> None:
    prompt = "a circle moving left"
    plain = generate_clips(wan, [prompt], STEPS, guidance_scale=4.0)[0]
    unlike = generate_clips(
        wan, [prompt], STEPS, guidance_scale=4.0, negative_prompt=["a red circle moving left"]
    )[0]

    assert difference(plain, unlike) > 1.0
