"""What forwards for a video take, where its card does not state it: reckoned from its default size and the
configurations beside its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.planning.device_limit import GIB
from deployments.protocol.card import ModelCard

PARTS = ("transformer", "vae")  # whose configurations are read
# what a forward takes for each token, in values as wide as the transformer: the residual, queries, keys,
# values and the inner layer of a feed-forward. HunyuanVideo 18, Wan 2.1 1.3B 16, LTX 16, Wan 14B 11
TOKEN_WIDTHS = 18
DECODE_GIB = 0.3  # of a VAE, for each million pixels of all frames: HunyuanVideo 0.29, Wan 0.12, LTX 0.09


@dataclass(frozen=True, slots=True)
class ForwardNeeds:
    """GiB in 16 bits at the card's default size."""

    row: float  # of a forward of the transformer
    decode: float


def video_activations(card: ModelCard, folder: Path) -> ForwardNeeds | None:
    """Of a card that makes whole videos; None where the configurations do not have what is needed.

    folder: of the pipeline. Raises OSError, ValueError, LookupError or TypeError for files that are not there
    or are no configurations.
    """
    assert card.videos is not None
    transformer, vae = (json.loads((folder / name / "config.json").read_bytes()) for name in PARTS)
    factors = _compression(vae)
    if factors is None or not isinstance(transformer.get("num_attention_heads"), int):
        return None
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    patches = _patch(transformer)
    frames, sides = card.videos.num_frames, (card.sizes.height, card.sizes.width)
    latents = [(frames - 1) // factors[0] + 1, *(side // factors[1] for side in sides)]
    tokens = math.prod(math.ceil(size / patch) for size, patch in zip(latents, patches, strict=True))
    pixels = math.prod(sides) * frames / 10**6
    return ForwardNeeds(tokens * width * 2 * TOKEN_WIDTHS / GIB, DECODE_GIB * pixels)


def _compression(vae: Mapping[str, Any]) -> tuple[int, int] | None:
    """Frames of a video for each of its latents, and pixels of a side, by what the configuration of the VAE
    has; None: nothing of it."""
    for times, sides in (
        ("scale_factor_temporal", "scale_factor_spatial"),
        ("temporal_compression_ratio", "spatial_compression_ratio"),
    ):
        if vae.get(times) and vae.get(sides):
            return int(vae[times]), int(vae[sides])
    if "temperal_downsample" in vae:  # as diffusers writes it: Wan
        return 2 ** sum(vae["temperal_downsample"]), 2 ** (len(vae["dim_mult"]) - 1)
    if "spatio_temporal_scaling" in vae:  # LTX
        scale = 2 ** sum(vae["spatio_temporal_scaling"])
        return int(vae["patch_size_t"]) * scale, int(vae["patch_size"]) * scale
    return None


def _patch(transformer: Mapping[str, Any]) -> tuple[int, int, int]:
    """Latents in a token: frames, height and width."""
    size = transformer.get("patch_size", 1)
    if isinstance(size, list):
        frames, height, width = size
        return frames, height, width
    return int(transformer.get("patch_size_t") or 1), int(size), int(size)
