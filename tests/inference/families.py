"""Tiny random pipelines of many families, and the requests that meet in one batch of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image

from tests.inference import tiny

PICTURE = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 40).convert("RGB")
PROMPTS = ("a cat", "a dog", "rain!")  # of one length: the families that do not pad can share as well
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A pipeline to build and what to ask of it."""

    build: Callable[[], Any]
    guidance: str | None = "guidance_scale"  # the parameter that differs between requests
    guidances: tuple[float, ...] = (1.0, 3.0, 5.0)
    common: Arguments = field(default_factory=dict)  # of every request
    size: Arguments = field(default_factory=lambda: {"height": 32, "width": 32})
    other_size: Arguments | None = field(default_factory=lambda: {"height": 64, "width": 32})
    image_class: str | None = None  # the family's image-to-image pipeline
    dtype: torch.dtype = torch.float64  # float32 where the pipeline insists on it
    output: str = "images"
    tasks: tuple[str, ...] | None = None  # None: by its arguments
    several: str | None = ""  # the parameter for several results; "": by the output; None: it has none

    @property
    def tolerance(self) -> float:
        return 1e-11 if self.dtype is torch.float64 else 1e-5

    def requests(self) -> list[Arguments]:
        """Text-to-image calls of different steps, guidance, seeds, prompts, numbers and sizes."""
        by_output = "num_videos_per_prompt" if self.output == "frames" else "num_images_per_prompt"
        several = by_output if self.several == "" else self.several
        calls: list[dict[str, Any]] = []
        for number, steps in enumerate((2, 4, 3, 3, 2)):
            arguments = {
                **self.common,
                **self.size,
                "prompt": PROMPTS[number % 3],
                "num_inference_steps": steps,
            }
            if self.guidance is not None:
                arguments[self.guidance] = self.guidances[number % len(self.guidances)]
            calls.append(arguments)
        if several is not None:
            calls[2][several] = 2
        if self.other_size is not None:
            calls += [{**calls[0], **self.other_size}, {**calls[1], **self.other_size}]
        return calls


def _flow(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**options)


def _vae(latent_channels: int = 4, **particulars: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        force_upcast=False,
        **particulars,
    )


def _tokenizer() -> Any:
    """One token per letter; it chats as well."""
    tokenizer = tiny._t5_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


_LANGUAGE: dict[str, Any] = {
    "vocab_size": 98,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def _language_model(kind: str, config: str) -> Any:
    return getattr(transformers, kind)(getattr(transformers, config)(**_LANGUAGE)).eval()


def _umt5() -> Any:
    config = transformers.UMT5Config(vocab_size=98, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    return transformers.UMT5EncoderModel(config).eval()


def _qwen_vl() -> Any:
    text = {
        **_LANGUAGE,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def sd3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            out_channels=4,
            pos_embed_max_size=32,
        ),
        scheduler=_flow(shift=3.0),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=tiny._clip(transformers.CLIPTextModelWithProjection),
        tokenizer=tiny._clip_tokenizer("<|endoftext|>"),
        text_encoder_2=tiny._clip(transformers.CLIPTextModelWithProjection),
        tokenizer_2=tiny._clip_tokenizer("!"),
        text_encoder_3=_t5_of(64),
        tokenizer_3=_tokenizer(),
    )


def _t5_of(width: int) -> Any:
    config = transformers.T5Config(
        vocab_size=98,
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config).eval()


def wan(*, expand_timesteps: bool = False) -> Any:
    """Wan 2.1; with expand_timesteps as Wan 2.2's small model, which has a time for every token."""
    return diffusers.WanPipeline(
        expand_timesteps=expand_timesteps,
        tokenizer=_tokenizer(),
        text_encoder=_umt5(),
        vae=diffusers.AutoencoderKLWan(
            base_dim=3,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        transformer=diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ),
    )


def ltx() -> Any:
    return diffusers.LTXPipeline(
        scheduler=_flow(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=1,
            encoder_causal=True,
            decoder_causal=False,
        ),
        text_encoder=tiny._t5(),
        tokenizer=_tokenizer(),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=1,
            caption_channels=32,
        ),
    )


def hunyuan_video() -> Any:
    return diffusers.HunyuanVideoPipeline(
        text_encoder=_language_model("LlamaModel", "LlamaConfig"),
        tokenizer=_tokenizer(),
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            text_embed_dim=32,
            pooled_projection_dim=32,
            rope_axes_dim=(2, 4, 4),
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        ),
        scheduler=_flow(shift=7.0),
        text_encoder_2=tiny._clip(transformers.CLIPTextModel),
        tokenizer_2=tiny._clip_tokenizer("<|endoftext|>"),
    )


def qwen_image() -> Any:
    return diffusers.QwenImagePipeline(
        scheduler=_flow(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=_qwen_vl(),
        tokenizer=_tokenizer(),
        transformer=diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=32,
            axes_dims_rope=(8, 4, 4),
        ),
    )


def z_image() -> Any:
    return diffusers.ZImagePipeline(
        scheduler=_flow(shift=3.0),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        text_encoder=_language_model("Qwen3Model", "Qwen3Config"),
        tokenizer=_tokenizer(),
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        ),
    )


def chroma() -> Any:
    return diffusers.ChromaPipeline(
        scheduler=_flow(),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        text_encoder=tiny._t5(),
        tokenizer=_tokenizer(),
        transformer=diffusers.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
    )


def flux2_klein() -> Any:
    return diffusers.Flux2KleinPipeline(
        scheduler=_flow(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
        ),
        text_encoder=_language_model("Qwen3ForCausalLM", "Qwen3Config"),
        tokenizer=_tokenizer(),
        transformer=diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=96,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
    )


def sana() -> Any:
    return diffusers.SanaPipeline(
        tokenizer=_tokenizer(),
        text_encoder=_language_model("Gemma2Model", "Gemma2Config"),
        vae=diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
        ),
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=32,
            sample_size=32,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def pixart() -> Any:
    return diffusers.PixArtSigmaPipeline(
        tokenizer=_tokenizer(),
        text_encoder=tiny._t5(),
        vae=_vae(),
        transformer=diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=16,
            caption_channels=32,
            sample_size=16,
            norm_type="ada_norm_single",
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def aura_flow() -> Any:
    return diffusers.AuraFlowPipeline(
        tokenizer=_tokenizer(),
        text_encoder=_umt5(),
        vae=_vae(),
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=16,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pos_embed_max_size=256,
        ),
        scheduler=_flow(shift=1.73),
    )


def lumina2() -> Any:
    return diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=4,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=2,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(256, 32, 32),
            cap_feat_dim=32,
        ),
        scheduler=_flow(shift=6.0),
        vae=_vae(shift_factor=0.1),
        text_encoder=_language_model("Gemma2Model", "Gemma2Config"),
        tokenizer=_tokenizer(),
    )


def cogvideox() -> Any:
    return diffusers.CogVideoXPipeline(
        tokenizer=_tokenizer(),
        text_encoder=tiny._t5(),
        vae=diffusers.AutoencoderKLCogVideoX(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
        ),
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=32,
            num_layers=1,
            sample_width=4,
            sample_height=4,
            sample_frames=9,
            max_text_seq_length=16,
            use_rotary_positional_embeddings=True,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def hidream() -> Any:
    pipeline = diffusers.HiDreamImagePipeline(
        scheduler=_flow(shift=3.0),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        text_encoder=tiny._clip(transformers.CLIPTextModelWithProjection),
        tokenizer=tiny._clip_tokenizer("<|endoftext|>"),
        text_encoder_2=tiny._clip(transformers.CLIPTextModelWithProjection),
        tokenizer_2=tiny._clip_tokenizer("!"),
        text_encoder_3=tiny._t5(),
        tokenizer_3=_tokenizer(),
        text_encoder_4=_language_model("LlamaForCausalLM", "LlamaConfig"),
        tokenizer_4=_tokenizer(),
        transformer=diffusers.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_channels=[32, 32],
            text_emb_dim=64,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(32, 32),
            llama_layers=[0, 1],
        ),
    )
    pipeline.default_sample_size = 16  # it scales every request to this area
    return pipeline


def ovis() -> Any:
    return diffusers.OvisImagePipeline(
        scheduler=_flow(use_dynamic_shifting=True),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        text_encoder=_language_model("Qwen3Model", "Qwen3Config"),
        tokenizer=_tokenizer(),
        transformer=diffusers.OvisImageTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def refiner() -> Any:
    """SDXL's refiner: the second text encoder alone, aesthetic scores in place of target sizes."""
    base = tiny.sdxl()
    unet = tiny._unet(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=32 + 5 * 8,
        cross_attention_dim=32,
    )
    return diffusers.StableDiffusionXLImg2ImgPipeline(
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


_VIDEO: dict[str, Any] = {"output": "frames", "other_size": {"height": 32, "width": 64}}
FAMILIES: dict[str, Family] = {
    "FLUX.1-dev": Family(tiny.flux, image_class="FluxImg2ImgPipeline", common={"max_sequence_length": 32}),
    "FLUX.1-schnell": Family(
        lambda: tiny.flux(guidance=False), guidance=None, common={"max_sequence_length": 32}
    ),
    "SDXL": Family(tiny.sdxl, image_class="StableDiffusionXLImg2ImgPipeline"),
    "SDXL refiner": Family(
        refiner, common={"image": PICTURE.resize((32, 32)), "strength": 1.0}, size={}, other_size=None
    ),
    "Stable Diffusion 1.5": Family(tiny.sd, image_class="StableDiffusionImg2ImgPipeline"),
    "Stable Diffusion 3": Family(
        sd3, image_class="StableDiffusion3Img2ImgPipeline", common={"max_sequence_length": 16}
    ),
    "Wan": Family(wan, common={"num_frames": 5, "max_sequence_length": 16}, **_VIDEO),
    "Wan 2.2 TI2V": Family(
        lambda: wan(expand_timesteps=True), common={"num_frames": 5, "max_sequence_length": 16}, **_VIDEO
    ),
    "LTX-Video": Family(
        ltx,
        common={"num_frames": 9, "max_sequence_length": 16},
        image_class="LTXImageToVideoPipeline",
        **_VIDEO,
    ),
    "HunyuanVideo": Family(
        hunyuan_video,
        common={
            "num_frames": 5,
            "max_sequence_length": 16,
            "prompt_template": {"template": "{}", "crop_start": 0},
        },
        **_VIDEO,
    ),
    "Qwen-Image": Family(
        qwen_image,
        guidance="true_cfg_scale",
        common={"negative_prompt": "grey!", "max_sequence_length": 32},
        image_class="QwenImageImg2ImgPipeline",
    ),
    "Z-Image": Family(
        z_image,
        guidances=(0.0, 3.0, 5.0),
        common={"max_sequence_length": 16},
        image_class="ZImageImg2ImgPipeline",
        dtype=torch.float32,
    ),
    "Chroma": Family(chroma, image_class="ChromaImg2ImgPipeline", common={"max_sequence_length": 16}),
    "FLUX.2 klein": Family(
        flux2_klein, common={"max_sequence_length": 16, "text_encoder_out_layers": (1, 2, 3)}
    ),
    "Sana": Family(
        sana,
        common={
            "max_sequence_length": 16,
            "complex_human_instruction": None,
            "use_resolution_binning": False,
        },
    ),
    "PixArt-Sigma": Family(
        pixart,
        common={"max_sequence_length": 16, "use_resolution_binning": False, "clean_caption": False},
    ),
    "AuraFlow": Family(aura_flow, common={"max_sequence_length": 16}),
    "Lumina 2": Family(lumina2, common={"max_sequence_length": 16, "system_prompt": "s"}),
    "CogVideoX": Family(
        cogvideox, common={"num_frames": 9, "max_sequence_length": 16}, output="frames", other_size=None
    ),
    "HiDream": Family(hidream, common={"max_sequence_length": 16}),
    "Ovis-Image": Family(ovis, common={"max_sequence_length": 16}),
}
