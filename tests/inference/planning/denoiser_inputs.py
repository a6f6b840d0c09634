"""Inputs of one row for the denoisers of published models at a card's default size, without values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deployments.protocol.card import ModelCard

Inputs = Callable[[ModelCard, Any], dict[str, Any]]
DTYPE = torch.bfloat16


def tensor(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """Without values."""
    return torch.empty(shape, device="meta", dtype=dtype)


def pixels_per_latent(vae: nn.Module) -> tuple[int, int]:
    """How many frames, and pixels of a side, one latent of this VAE stands for."""
    config: Any = vae.config
    if hasattr(vae, "temperal_downsample"):  # Wan, Qwen-Image
        steps = config.get("temperal_downsample", vae.temperal_downsample)
        side = config.get("scale_factor_spatial") or 2 ** len(steps)
        return config.get("scale_factor_temporal") or 2 ** sum(steps), side
    if config.get("spatial_compression_ratio"):
        return config["temporal_compression_ratio"], config["spatial_compression_ratio"]
    if hasattr(vae, "spatial_compression_ratio"):
        return getattr(vae, "temporal_compression_ratio", 1), vae.spatial_compression_ratio
    if "temporal_compression_ratio" in config:  # CogVideoX
        return int(config["temporal_compression_ratio"]), 2 ** (len(config["block_out_channels"]) - 1)
    channels = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return 1, 2 ** (len(channels) - 1)


def grid(card: ModelCard, frames_per_latent: int, side: int) -> tuple[int, int, int]:
    """Latents of the default size: in time, height and width."""
    frames = card.videos.num_frames if card.videos else 1
    return (frames - 1) // frames_per_latent + 1, card.sizes.height // side, card.sizes.width // side


def latent_shape(card: ModelCard, vae: nn.Module) -> tuple[int, ...]:
    """Of one picture or video of the default size."""
    config: Any = vae.config
    frames, height, width = grid(card, *pixels_per_latent(vae))
    channels = config.get("z_dim") or config["latent_channels"]
    is_video = hasattr(vae, "temperal_downsample") or card.videos is not None
    return (1, channels, frames, height, width) if is_video else (1, channels, height, width)


def _tokens(card: ModelCard, side: int = 16) -> int:
    """Of a picture, and of as many reference pictures of its size as the model was trained with: one."""
    return card.sizes.height // side * (card.sizes.width // side) * (2 if card.references else 1)


def _flux(card: ModelCard, model: Any) -> dict[str, Any]:
    tokens, text = _tokens(card), card.max_sequence_length or 512
    return {
        "hidden_states": tensor(1, tokens, model.config.in_channels),
        "encoder_hidden_states": tensor(1, text, model.config.joint_attention_dim),
        "pooled_projections": tensor(1, 768),
        "timestep": tensor(1),
        "img_ids": tensor(tokens, 3),
        "txt_ids": tensor(text, 3),
        "guidance": tensor(1) if model.config.get("guidance_embeds") else None,
    }


def _chroma(card: ModelCard, model: Any) -> dict[str, Any]:
    inputs = _flux(card, model)
    tokens = inputs["hidden_states"].shape[1] + inputs["encoder_hidden_states"].shape[1]
    unused = ("pooled_projections", "guidance")  # Chroma has none
    return {name: value for name, value in inputs.items() if name not in unused} | {
        "attention_mask": tensor(1, tokens, dtype=torch.bool)
    }


def _flux_2(card: ModelCard, model: Any) -> dict[str, Any]:
    tokens, text = _tokens(card), card.max_sequence_length or 512
    return {
        "hidden_states": tensor(1, tokens, 128),
        "encoder_hidden_states": tensor(1, text, model.config.joint_attention_dim),
        "timestep": tensor(1),
        "img_ids": tensor(1, tokens, 4),
        "txt_ids": tensor(1, text, 4),
        "guidance": tensor(1) if model.config.get("guidance_embeds") else None,
    }


def _wan(card: ModelCard, model: Any) -> dict[str, Any]:
    side = 16 if model.config.in_channels == 48 else 8
    frames, height, width = grid(card, 4, side)
    inputs = {
        "hidden_states": tensor(1, model.config.in_channels, frames, height, width),
        "encoder_hidden_states": tensor(1, 512, 4096),
        "timestep": tensor(1, frames * height * width // 4) if side == 16 else tensor(1),
    }
    if model.config.image_dim is not None:
        inputs["encoder_hidden_states_image"] = tensor(1, 257, model.config.image_dim)
    return inputs


def _sd3(card: ModelCard, model: Any) -> dict[str, Any]:
    return {
        "hidden_states": tensor(1, 16, card.sizes.height // 8, card.sizes.width // 8),
        "encoder_hidden_states": tensor(1, 77 + (card.max_sequence_length or 256), 4096),
        "pooled_projections": tensor(1, 2048),
        "timestep": tensor(1),
    }


def _pixart(card: ModelCard, model: Any) -> dict[str, Any]:
    return {
        "hidden_states": tensor(1, 4, card.sizes.height // 8, card.sizes.width // 8),
        "encoder_hidden_states": tensor(1, 300, 4096),
        "encoder_attention_mask": tensor(1, 300),
        "timestep": tensor(1),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sana(card: ModelCard, model: Any) -> dict[str, Any]:
    return {
        "hidden_states": tensor(1, 32, card.sizes.height // 32, card.sizes.width // 32),
        "encoder_hidden_states": tensor(1, 300, 2304),
        "encoder_attention_mask": tensor(1, 300),
        "timestep": tensor(1),
    }


def _cogvideox(card: ModelCard, model: Any) -> dict[str, Any]:
    frames, height, width = grid(card, 4, 8)
    tokens = frames * height * width // 4
    return {
        "hidden_states": tensor(1, frames, 16, height, width),
        "encoder_hidden_states": tensor(1, 226, 4096),
        "timestep": tensor(1),
        "image_rotary_emb": (tensor(tokens, 64), tensor(tokens, 64)),
    }


def _unet(card: ModelCard, model: Any) -> dict[str, Any]:
    added = {"text_embeds": tensor(1, 1280), "time_ids": tensor(1, 6)}
    return {
        "sample": tensor(1, 4, card.sizes.height // 8, card.sizes.width // 8),
        "timestep": tensor(1),
        "encoder_hidden_states": tensor(1, 77, model.config.cross_attention_dim),
        "added_cond_kwargs": added if model.config.addition_embed_type else None,
    }


def _qwen(card: ModelCard, model: Any) -> dict[str, Any]:
    tokens, text = _tokens(card), card.max_sequence_length or 512
    one = (1, card.sizes.height // 16, card.sizes.width // 16)
    return {
        "hidden_states": tensor(1, tokens, 64),
        "encoder_hidden_states": tensor(1, text, 3584),
        "encoder_hidden_states_mask": tensor(1, text, dtype=torch.bool),
        "timestep": tensor(1),
        "img_shapes": [[one] * (2 if card.references else 1)],
    }


def _lumina_2(card: ModelCard, model: Any) -> dict[str, Any]:
    return {
        "hidden_states": tensor(1, 16, card.sizes.height // 8, card.sizes.width // 8),
        "timestep": tensor(1),
        "encoder_hidden_states": tensor(1, 256, 2304),
        "encoder_attention_mask": torch.ones(1, 256, dtype=torch.bool),
    }


def _ltx(card: ModelCard, model: Any) -> dict[str, Any]:
    frames, height, width = grid(card, 8, 32)
    return {
        "hidden_states": tensor(1, frames * height * width, 128),
        "encoder_hidden_states": tensor(1, 128, 4096),
        "timestep": tensor(1),
        "encoder_attention_mask": tensor(1, 128),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


INPUTS: Mapping[str, Inputs] = {
    "FluxTransformer2DModel": _flux,
    "ChromaTransformer2DModel": _chroma,
    "Flux2Transformer2DModel": _flux_2,
    "WanTransformer3DModel": _wan,
    "SD3Transformer2DModel": _sd3,
    "PixArtTransformer2DModel": _pixart,
    "SanaTransformer2DModel": _sana,
    "CogVideoXTransformer3DModel": _cogvideox,
    "QwenImageTransformer2DModel": _qwen,
    "Lumina2Transformer2DModel": _lumina_2,
    "LTXVideoTransformer3DModel": _ltx,
    "UNet2DConditionModel": _unet,
}
