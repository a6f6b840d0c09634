"""Pipelines of the real diffusers classes with random weights, made in memory in well under a second.

Noise in, noise out: good for proving arithmetic, not for looking at pictures (models/ has trained ones).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from deployments.protocol.request import Task

IMAGE_TASKS = (Task.t2i, Task.i2i, Task.inpaint, Task.refine)


def flux(*, guidance: bool = True, seed: int = 0) -> FluxPipeline:
    """FLUX.1-dev in small (guidance embedded, dynamic shifting); schnell's shape without guidance.

    One latent pixel covers 2x2 picture pixels, so 64x64 px are 256 tokens.
    """
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        force_upcast=False,  # as models/load.py sets it
    )
    shifting = {"use_dynamic_shifting": True, "shift": 3.0} if guidance else {"shift": 1.0}
    return _quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**shifting),
            vae=vae,
            text_encoder=_clip(CLIPTextModel),
            tokenizer=_clip_tokenizer("<|endoftext|>"),
            text_encoder_2=_t5(),
            tokenizer_2=_t5_tokenizer(),
            transformer=transformer,
        )
    )


def sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """SDXL base in small: two text encoders, size conditioning, classifier-free guidance."""
    torch.manual_seed(seed)
    unet = _unet(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=32 + 6 * 8,
        cross_attention_dim=64,
    )
    return _quiet(
        StableDiffusionXLPipeline(
            vae=_sd_vae(),
            text_encoder=_clip(CLIPTextModel),
            text_encoder_2=_clip(CLIPTextModelWithProjection),
            tokenizer=_clip_tokenizer("<|endoftext|>"),
            tokenizer_2=_clip_tokenizer("!"),
            unet=unet,
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                timestep_spacing="leading",
                steps_offset=1,
            ),
            add_watermarker=False,
        )
    )


def sdxl_refiner() -> StableDiffusionXLImg2ImgPipeline:
    """SDXL's refiner in small: one text encoder, a score of beauty in place of the target size."""
    base = sdxl()
    torch.manual_seed(9)
    unet = UNet2DConditionModel.from_config(
        base.unet.config, cross_attention_dim=32, projection_class_embeddings_input_dim=32 + 5 * 8
    )
    return StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=None,
        text_encoder_2=base.text_encoder_2,
        tokenizer=None,
        tokenizer_2=base.tokenizer_2,
        unet=unet,
        scheduler=base.scheduler,
        requires_aesthetics_score=True,
        add_watermarker=False,
    )


def sd(seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 in small, with its DDIM noise scheduler."""
    torch.manual_seed(seed)
    unet = _unet(attention_head_dim=4, cross_attention_dim=32)
    return _quiet(
        StableDiffusionPipeline(
            vae=_sd_vae(),
            text_encoder=_clip(CLIPTextModel),
            tokenizer=_clip_tokenizer("<|endoftext|>"),
            unet=unet,
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _unet(**particulars: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        **particulars,
    )


def _sd_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        force_upcast=False,  # as models/load.py sets it
    )


def _clip_vocabulary() -> list[str]:
    letters = list(bytes_to_unicode().values())
    return [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]


def _clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    vocabulary = {token: i for i, token in enumerate(_clip_vocabulary())}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, pad_token=pad_token)


def _clip(kind: type) -> Any:
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=32,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return kind(config).eval()


def _t5_tokenizer() -> T5Tokenizer:
    letters = [(chr(c), -3.0) for c in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def _t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=98, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()
