"""Configurations of published models by part, to be built without weights.

Those that configurations.json has stand there with their sources; of the others it is config.json of the
repositories named beside them. Where a configuration is empty, the defaults of diffusers' class are those of
the repository. What the simulated device serves is taken from there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from tests.device_sim.models import FLUX_CONTROLNET, REFINER_UNET, SDXL_CONTROLNET, SDXL_UNET, WAN_SMALL

Part = tuple[Any, Any]  # a class and its configuration


def _clip(width: int, layers: int, projection: int) -> Any:
    return transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        projection_dim=projection,
    )


def _autoencoder(channels: int) -> dict[str, Any]:
    """AutoencoderKL of Stable Diffusion (4 channels) and FLUX (16)."""
    return {
        "latent_channels": channels,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "use_quant_conv": channels == 4,
        "use_post_quant_conv": channels == 4,
        "sample_size": 1024,
    }


def _flux(*, guidance: bool) -> dict[str, Any]:
    return {
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": guidance,
        "axes_dims_rope": [16, 56, 56],
    }


T5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
GATED = {"feed_forward_proj": "gated-gelu"}
SD_UNET = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
CLIP_L: Part = (transformers.CLIPTextModel, _clip(768, 12, 768))
CLIP_G: Part = (transformers.CLIPTextModelWithProjection, _clip(1280, 32, 1280))
T5_XXL: Part = (transformers.T5EncoderModel, transformers.T5Config(**T5, **GATED))
UMT5_XXL: Part = (transformers.UMT5EncoderModel, transformers.UMT5Config(**T5, **GATED, vocab_size=256384))
SD_VAE: Part = (diffusers.AutoencoderKL, _autoencoder(4))
FLUX_VAE: Part = (diffusers.AutoencoderKL, _autoencoder(16))


def _flux_1(*, guidance: bool) -> dict[str, Part]:
    return {
        "transformer": (diffusers.FluxTransformer2DModel, _flux(guidance=guidance)),
        "text_encoder": CLIP_L,
        "text_encoder_2": T5_XXL,
        "vae": FLUX_VAE,
    }


def _wan(**transformer: Any) -> dict[str, Part]:
    return {
        "transformer": (diffusers.WanTransformer3DModel, transformer),
        "text_encoder": UMT5_XXL,
        "vae": (diffusers.AutoencoderKLWan, {}),
    }


_WRITTEN_HERE: Mapping[str, Mapping[str, Part]] = {
    "flux.1-dev": _flux_1(guidance=True)
    | {"controlnet": (diffusers.FluxControlNetModel, FLUX_CONTROLNET)},  # Shakker-Labs' Union Pro 2.0
    "flux.1-schnell": _flux_1(guidance=False),
    "sdxl-base-1.0": {
        "unet": (diffusers.UNet2DConditionModel, SDXL_UNET),
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
        "vae": SD_VAE,
        "controlnet": (diffusers.ControlNetModel, SDXL_CONTROLNET),
    },
    "sdxl-refiner-1.0": {
        "unet": (diffusers.UNet2DConditionModel, REFINER_UNET),
        "text_encoder_2": CLIP_G,
        "vae": SD_VAE,
    },
    "stable-diffusion-v1.5": {
        "unet": (diffusers.UNet2DConditionModel, SD_UNET),
        "text_encoder": CLIP_L,
        "vae": SD_VAE,
        "controlnet": (diffusers.ControlNetModel, {"cross_attention_dim": 768}),
    },
    "hunyuan-video": {
        "transformer": (diffusers.HunyuanVideoTransformer3DModel, {}),
        "text_encoder": (
            transformers.LlamaModel,
            transformers.LlamaConfig(
                vocab_size=128320,
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
            ),
        ),
        "text_encoder_2": CLIP_L,
        "vae": (diffusers.AutoencoderKLHunyuanVideo, {}),
    },
    "wan-2.1-t2v-14b": _wan(),  # Wan-AI/Wan2.1-T2V-14B-Diffusers
    "wan-2.1-t2v-1.3b": _wan(**WAN_SMALL),  # Wan2.1-T2V-1.3B-Diffusers
    "ltx-video": {  # Lightricks/LTX-Video, 0.9
        "transformer": (diffusers.LTXVideoTransformer3DModel, {}),
        "text_encoder": T5_XXL,
        "vae": (diffusers.AutoencoderKLLTXVideo, {}),
    },
    "flux.2-dev": {  # black-forest-labs/FLUX.2-dev; Mistral-Small-3.2-24B
        "transformer": (diffusers.Flux2Transformer2DModel, {}),
        "text_encoder": (
            transformers.Mistral3ForConditionalGeneration,
            transformers.Mistral3Config(
                text_config=transformers.MistralConfig(
                    hidden_size=5120,
                    intermediate_size=32768,
                    num_hidden_layers=40,
                    num_attention_heads=32,
                    num_key_value_heads=8,
                    head_dim=128,
                    vocab_size=131072,
                    tie_word_embeddings=False,
                ),
                tie_word_embeddings=False,
            ),
        ),
        "vae": (diffusers.AutoencoderKLFlux2, {}),
    },
    "flux.2-klein-4b": {  # black-forest-labs/FLUX.2-klein-4B; Qwen3-4B
        "transformer": (
            diffusers.Flux2Transformer2DModel,
            {
                "num_layers": 5,
                "num_single_layers": 20,
                "num_attention_heads": 24,
                "joint_attention_dim": 7680,
                "guidance_embeds": False,
            },
        ),
        "text_encoder": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**QWEN3_4B)),
        "vae": (diffusers.AutoencoderKLFlux2, {}),
    },
    "qwen-image": {  # Qwen/Qwen-Image; Qwen2.5-VL-7B-Instruct
        "transformer": (diffusers.QwenImageTransformer2DModel, {}),
        "text_encoder": (
            transformers.Qwen2_5_VLForConditionalGeneration,
            transformers.Qwen2_5_VLConfig(
                text_config={
                    "hidden_size": 3584,
                    "intermediate_size": 18944,
                    "num_hidden_layers": 28,
                    "num_attention_heads": 28,
                    "num_key_value_heads": 4,
                    "vocab_size": 152064,
                },
                vision_config={
                    "depth": 32,
                    "hidden_size": 1280,
                    "intermediate_size": 3420,
                    "num_heads": 16,
                    "out_hidden_size": 3584,
                },
            ),
        ),
        "vae": (diffusers.AutoencoderKLQwenImage, {}),
    },
    "z-image-turbo": {  # Tongyi-MAI/Z-Image-Turbo; Qwen3-4B
        "transformer": (diffusers.ZImageTransformer2DModel, {}),
        "text_encoder": (transformers.Qwen3Model, transformers.Qwen3Config(**QWEN3_4B)),
        "vae": FLUX_VAE,
    },
}


CONFIGURATIONS: Mapping[str, Any] = json.loads(
    (Path(__file__).parent / "configurations.json").read_text(encoding="utf-8")
)
PIPELINES: Mapping[str, str] = CONFIGURATIONS["pipelines"]  # class of diffusers, by the card's id


def _part(name: str) -> Part:
    """By its name in configurations.json, or as "model/part" of a model that is written here."""
    if "/" in name:
        model, _, part = name.partition("/")
        return _WRITTEN_HERE[model][part]
    entry = CONFIGURATIONS["parts"][name]
    library, _, kind = entry["class"].partition(".")
    module_class = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
    if library == "diffusers":
        return module_class, entry["config"]
    return module_class, module_class.config_class(**entry["config"])


MODELS: Mapping[str, Mapping[str, Part]] = {
    **_WRITTEN_HERE,
    **{
        model: {part: _part(name) for part, name in parts.items()}
        for model, parts in CONFIGURATIONS["models"].items()
    },
}


def built(kind: Any, config: Any) -> nn.Module:
    """The module of a part on the meta device: shapes without values."""
    with torch.device("meta"):
        is_transformers = isinstance(config, transformers.PreTrainedConfig)
        module: nn.Module = kind(config) if is_transformers else kind.from_config(config)
    return module.eval()
