"""Pipelines of the published sizes without weights, as from_pretrained gives them for the repositories.

The configurations are those of the repositories' config.json; tokenizers are those of the tiny models that
ship, which give the same numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from deployments.models import load, model_loader
from deployments.models.model_memory import weights_bytes
from deployments.protocol.card import ModelCard, Weights, load_card
from tests.device_sim.device import SimulatedDevice
from tests.device_sim.forwards import measure

ROOT = Path(__file__).parents[2]

Build = Callable[[Any, Any], Any]  # a module from its class and its configuration

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@dataclass(frozen=True, slots=True)
class _Built:
    """In place of the files of a module: it is on the device already."""

    module: nn.Module
    folder: Path = Path()  # nothing is read from it
    stored_form: str | None = None

    @property
    def size_bytes(self) -> int:
        return weights_bytes([self.module])

    device_bytes = held_bytes = size_bytes

    def load(self, _device: torch.device) -> nn.Module:
        return self.module


def install(device: SimulatedDevice) -> None:
    """Have the loading code find modules built on the device instead of files with weights."""
    build = _builder(device)
    pipelines: dict[Path, Any] = {}

    def find_parts(folder: Path, *_: Any) -> dict[str, _Built]:
        pipeline = pipelines[folder] = PIPELINES[str(folder)](build)
        modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        measure(list(modules.values()), device.measurements)
        return {name: _Built(module) for name, module in modules.items()}

    def find_part(_kind: Any, folder: Path, _weights: Weights) -> _Built:
        kind, config = CONTROLNETS[str(folder)]
        net = build(kind, config)
        measure([net], device.measurements)
        return _Built(net)

    loading: Any = load
    loading.hub_folder = lambda weights, **_: Path(weights.repo)
    loading.find_parts, loading.find_part = find_parts, find_part
    loading.assemble = lambda folder, *_: pipelines.pop(folder)
    loader: Any = model_loader
    loader.fetch = lambda *_args, **_options: None
    without_weights: Any = transformers.PreTrainedModel
    without_weights.init_weights = lambda self: None


def _builder(device: SimulatedDevice) -> Build:
    def build(kind: Any, config: Any) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda"):
                is_transformers = isinstance(config, transformers.PreTrainedConfig)
                module = kind(config) if is_transformers else kind.from_config(config)
        finally:
            torch.set_default_dtype(before)
        module.eval()
        for weight in [*module.parameters(), *module.buffers()]:
            if weight.is_floating_point():
                weight.requires_grad_(False)
            device.memory.hold(weight)
        vars(module)["to"] = lambda *_args, **_kwargs: module  # it has the device and the dtype already
        return module

    return build


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


def _sd15(build: Build) -> Any:
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
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _wan(build: Build) -> Any:
    """Wan 2.1 T2V 14B: the defaults of diffusers' classes are its configuration."""
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
        transformer=build(diffusers.WanTransformer3DModel, {}),
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
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _sd15,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan,
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
}
