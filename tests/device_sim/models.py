"""Pipelines of the published sizes without weights; repository.py has the loading code find them.

The configurations are those of the repositories' config.json; tokenizers are those of the tiny models that
ship, which give the same numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

from deployments.protocol.card import ModelCard, Weights, load_card

ROOT = Path(__file__).parents[2]

Build = Callable[[Any, Any], Any]  # a module from its class and its configuration

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _tokenizer(model: str, folder: str = "tokenizer") -> Any:
    return transformers.AutoTokenizer.from_pretrained(str(ROOT / "models" / model / folder))


def _vae(build: Build, channels: int, scaling_factor: float, shift_factor: float | None = None) -> Any:
    """AutoencoderKL of Stable Diffusion (4 channels) and FLUX (16)."""
    with_convolutions = channels == 4
    return build(
        diffusers.AutoencoderKL,
        {
            "latent_channels": channels,
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 2,
            "use_quant_conv": with_convolutions,
            "use_post_quant_conv": with_convolutions,
            "scaling_factor": scaling_factor,
            "shift_factor": shift_factor,
            "sample_size": 1024,
        },
    )


def _clip_config(width: int, layers: int, projection: int) -> Any:
    return transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        projection_dim=projection,
        bos_token_id=512,  # of the tiny models' tokenizers
        eos_token_id=513,
        pad_token_id=513,
    )


def _clip_l(build: Build) -> Any:
    return build(transformers.CLIPTextModel, _clip_config(768, 12, 768))


def _flux(build: Build, *, guidance: bool) -> Any:
    t5 = transformers.T5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    transformer = {
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
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guidance else {"shift": 1.0}
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**shift),
        vae=_vae(build, 16, 0.3611, 0.1159),
        text_encoder=_clip_l(build),
        tokenizer=_tokenizer("tiny-flux-dev"),
        text_encoder_2=build(transformers.T5EncoderModel, t5),
        tokenizer_2=_tokenizer("tiny-flux-dev", "tokenizer_2"),
        transformer=build(diffusers.FluxTransformer2DModel, transformer),
    )


SDXL_UNET = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


# stabilityai/stable-diffusion-xl-refiner-1.0
REFINER_UNET = {
    "sample_size": 128,
    "block_out_channels": [384, 768, 1536, 1536],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 4,
    "attention_head_dim": [6, 12, 24, 24],
    "cross_attention_dim": 1280,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2560,
}


def _sdxl(build: Build) -> Any:
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **SD_BETAS)
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(build, 4, 0.13025),
        text_encoder=_clip_l(build),
        text_encoder_2=build(transformers.CLIPTextModelWithProjection, _clip_config(1280, 32, 1280)),
        tokenizer=_tokenizer("tiny-sdxl-base"),
        tokenizer_2=_tokenizer("tiny-sdxl-base", "tokenizer_2"),
        unet=build(diffusers.UNet2DConditionModel, SDXL_UNET),
        scheduler=scheduler,
    )


def _sdxl_refiner(build: Build) -> Any:
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **SD_BETAS)
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=_vae(build, 4, 0.13025),
        text_encoder=None,
        text_encoder_2=build(transformers.CLIPTextModelWithProjection, _clip_config(1280, 32, 1280)),
        tokenizer=None,
        tokenizer_2=_tokenizer("tiny-sdxl-base", "tokenizer_2"),
        unet=build(diffusers.UNet2DConditionModel, REFINER_UNET),
        scheduler=scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )


def _sd15(build: Build, *, checked: bool = False) -> Any:
    """checked: with the safety checker of the repository."""
    unet = {
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    }
    return diffusers.StableDiffusionPipeline(
        vae=_vae(build, 4, 0.18215),
        text_encoder=_clip_l(build),
        tokenizer=_tokenizer("tiny-sd15"),
        unet=build(diffusers.UNet2DConditionModel, unet),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, **SD_BETAS),
        safety_checker=build(StableDiffusionSafetyChecker, CHECKER) if checked else None,
        feature_extractor=transformers.CLIPImageProcessor() if checked else None,
        requires_safety_checker=checked,
    )


# CompVis/stable-diffusion-safety-checker
CHECKER = transformers.CLIPConfig(
    vision_config={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    projection_dim=768,
)
WAN_SMALL = {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}  # Wan 2.1 T2V 1.3B


def _wan(build: Build, transformer: Mapping[str, Any] | None = None) -> Any:
    """Wan 2.1 T2V: the defaults of diffusers' classes are the configuration of the 14B."""
    umt5 = transformers.UMT5Config(
        vocab_size=256384,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    return diffusers.WanPipeline(
        tokenizer=_tokenizer("tiny-wan"),
        text_encoder=build(transformers.UMT5EncoderModel, umt5),
        transformer=build(diffusers.WanTransformer3DModel, dict(transformer or {})),
        vae=build(diffusers.AutoencoderKLWan, {}),
        scheduler=scheduler,
    )


def _hunyuan_video(build: Build) -> Any:
    """HunyuanVideo: the defaults of diffusers' classes are its configuration."""
    llama = transformers.LlamaConfig(
        vocab_size=128320,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=build(transformers.LlamaModel, llama),
        tokenizer=_tokenizer("tiny-wan"),
        transformer=build(diffusers.HunyuanVideoTransformer3DModel, {}),
        vae=build(diffusers.AutoencoderKLHunyuanVideo, {}),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=_clip_l(build),
        tokenizer_2=_tokenizer("tiny-flux-dev"),
    )


def _wan_card() -> ModelCard:
    """No card of Wan 2.1 14B ships: the tiny one's with the repository and the sizes of the large one."""
    tiny = _card("tiny-wan")
    assert tiny.videos is not None
    sizes = tiny.sizes.model_copy(update={"width": 832, "height": 480, "max": 1280, "max_pixels": 921600})
    videos = tiny.videos.model_copy(
        update={"num_frames": 81, "fps": 16, "max_frames": 129, "max_frame_pixels": 118886400}
    )
    weights = Weights(repo="Wan-AI/Wan2.1-T2V-14B-Diffusers")
    return tiny.model_copy(
        update={
            "id": "wan-2.1-14b",
            "weights": weights,
            "sizes": sizes,
            "videos": videos,
            "max_sequence_length": 512,
        }
    )


def _card(name: str) -> ModelCard:
    return load_card(ROOT / f"configs/models/{name}.yaml")


PIPELINES: Mapping[str, Callable[[Build], Any]] = {
    "black-forest-labs/FLUX.1-dev": lambda build: _flux(build, guidance=True),
    "black-forest-labs/FLUX.1-schnell": lambda build: _flux(build, guidance=False),
    "stabilityai/stable-diffusion-xl-base-1.0": _sdxl,
    "stabilityai/stable-diffusion-xl-refiner-1.0": _sdxl_refiner,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _sd15,
    "stable-diffusion-v1-5/with-safety-checker": lambda build: _sd15(build, checked=True),
    "Lykon/dreamshaper-8": lambda build: _sd15(build, checked=True),
    "SG161222/Realistic_Vision_V6.0_B1_noVAE": lambda build: _sd15(build, checked=True),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": lambda build: _wan(build, WAN_SMALL),
    "hunyuanvideo-community/HunyuanVideo": _hunyuan_video,
}
MODELS: Mapping[str, Callable[[], ModelCard]] = {  # by short name
    "flux": lambda: _card("flux.1-dev"),
    "schnell": lambda: _card("flux.1-schnell"),
    "sdxl": lambda: _card("sdxl-base-1.0"),
    "sd15": lambda: _card("stable-diffusion-v1.5"),
    "wan": _wan_card,
    "hunyuan": lambda: _card("hunyuan-video"),
}

FLUX_CONTROLNET = {
    "in_channels": 64,
    "num_layers": 6,
    "num_single_layers": 0,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
SDXL_CONTROLNET = {
    name: SDXL_UNET[name]
    for name in SDXL_UNET
    if name not in ("sample_size", "out_channels", "up_block_types", "down_block_types")
} | {"down_block_types": SDXL_UNET["down_block_types"]}

CONTROLNETS: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0": (diffusers.FluxControlNetModel, FLUX_CONTROLNET),
    "diffusers/controlnet-canny-sdxl-1.0": (diffusers.ControlNetModel, SDXL_CONTROLNET),
    "diffusers/controlnet-depth-sdxl-1.0": (diffusers.ControlNetModel, SDXL_CONTROLNET),
}
