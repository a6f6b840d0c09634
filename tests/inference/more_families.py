"""Tiny random pipelines of further families and of their variants: edits, inpainting, pictures to videos."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from PIL import Image

from deployments.pipelines.given_frames import frame_arguments
from tests.inference import tiny
from tests.inference.families import (
    PICTURE,
    Family,
    _flow,
    _language_model,
    _tokenizer,
    _vae,
    cogvideox,
    flux2_klein,
    ltx,
    pixart,
    qwen_image,
    sana,
    wan,
    z_image,
)
from tests.inference.tiny_controls import flux_controlnet, unet_controlnet

SMALL = PICTURE.resize((32, 32))
END = PICTURE.resize((32, 32)).transpose(Image.Transpose.ROTATE_90)
MASK = Image.new("L", (32, 32)).point(lambda _value: 0)
MASK.paste(255, (0, 0, 16, 32))
FRAMES = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}


def over(source: Any, kind: str, **changes: Any) -> Any:
    """A pipeline of this class over the components of `source`."""
    pipeline_class = getattr(diffusers, kind)
    modules, options = pipeline_class._get_signature_keys(pipeline_class)
    parts = {name: part for name, part in source.components.items() if name in modules} | changes
    config = {name: source.config[name] for name in options if name in source.config and name not in parts}
    return pipeline_class(**parts, **config)


def flux_with_channels(kind: str, channels: int) -> Any:
    """FLUX.1 whose transformer reads more channels than the latents have."""
    source = tiny.flux()
    config = {name: value for name, value in source.transformer.config.items() if not name.startswith("_")}
    transformer = diffusers.FluxTransformer2DModel(**config | {"in_channels": channels, "out_channels": 16})
    return over(source, kind, transformer=transformer)


def wider(module: Any, channels: int) -> Any:
    """The same kind of module for so many input channels."""
    return type(module).from_config({**module.config, "in_channels": channels})


def inpainting_unet(source: Any, kind: str) -> Any:
    return over(source, kind, unet=wider(source.unet, 9))


def wan_part(kind: str, **changes: Any) -> Any:
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return getattr(diffusers, kind)(**{**config, **changes})


def wan_a14b() -> Any:
    """Wan 2.2 A14B from a picture: two experts, and no picture encoder."""
    experts = [wan_part("WanTransformer3DModel", in_channels=36) for _ in range(2)]
    return over(
        wan(),
        "WanImageToVideoPipeline",
        transformer=experts[0],
        transformer_2=experts[1],
        boundary_ratio=0.5,
        image_encoder=None,
        image_processor=None,
    )


def wan_vace() -> Any:
    transformer = wan_part("WanVACETransformer3DModel", vace_layers=[0, 1], vace_in_channels=96)
    return over(wan(), "WanVACEPipeline", transformer=transformer, transformer_2=None)


def anyflow() -> Any:
    transformer = wan_part("AnyFlowTransformer3DModel")
    scheduler = diffusers.FlowMapEulerDiscreteScheduler()
    return over(wan(), "AnyFlowPipeline", transformer=transformer, scheduler=scheduler)


def skyreels(kind: str) -> Any:
    return over(wan(), kind, transformer=wan_part("SkyReelsV2Transformer3DModel"))


def sana_video() -> Any:
    transformer = diffusers.SanaVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=32,
        rope_max_seq_len=32,
    )
    return over(sana(), "SanaVideoPipeline", transformer=transformer, vae=wan().vae)


def cogview4() -> Any:
    return diffusers.CogView4Pipeline(
        tokenizer=_tokenizer(),
        text_encoder=_language_model("GlmModel", "GlmConfig"),
        vae=_vae(),
        transformer=diffusers.CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=32,
            time_embed_dim=16,
            condition_dim=8,
            pos_embed_max_size=16,
            rope_axes_dim=(16, 16),
        ),
        scheduler=_flow(base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True),
    )


def cogview3() -> Any:
    return diffusers.CogView3PlusPipeline(
        tokenizer=_tokenizer(),
        text_encoder=tiny._t5(),
        vae=_vae(),
        transformer=diffusers.CogView3PlusTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=32,
            time_embed_dim=16,
            condition_dim=8,
            pos_embed_max_size=32,
            sample_size=16,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def bria() -> Any:
    return diffusers.BriaPipeline(
        transformer=diffusers.BriaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=[4, 4, 8],
        ),
        scheduler=_flow(),
        vae=_vae(),
        text_encoder=tiny._t5(),
        tokenizer=_tokenizer(),
    )


def latte() -> Any:
    return diffusers.LattePipeline(
        tokenizer=_tokenizer(),
        text_encoder=tiny._t5(),
        vae=_vae(),
        transformer=diffusers.LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            cross_attention_dim=16,
            attention_bias=True,
            sample_size=16,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=32,
            video_length=4,
        ),
        scheduler=diffusers.DDIMScheduler(),
    )


def lumina_next() -> Any:
    return diffusers.LuminaPipeline(
        transformer=diffusers.LuminaNextDiT2DModel(
            sample_size=4,
            hidden_size=32,
            num_layers=1,
            num_attention_heads=2,
            num_kv_heads=2,
            multiple_of=16,
            cross_attention_dim=32,
        ),
        scheduler=_flow(),
        vae=_vae(),
        text_encoder=_language_model("GemmaModel", "GemmaConfig"),
        tokenizer=_tokenizer(),
    )


def pixart_alpha() -> Any:
    source = pixart()
    config = {**source.transformer.config, "use_additional_conditions": False}
    return over(source, "PixArtAlphaPipeline", transformer=type(source.transformer).from_config(config))


def cogvideox_i2v() -> Any:
    source = cogvideox()
    return over(source, "CogVideoXImageToVideoPipeline", transformer=wider(source.transformer, 8))


_VIDEO: dict[str, Any] = {"output": "frames", "other_size": None}
_INPAINT: dict[str, Any] = {"tasks": ("inpaint",), "other_size": None}
_MASKED = {"image": SMALL, "mask_image": MASK, "strength": 1.0}
MORE: dict[str, Family] = {
    "FLUX.1 Kontext": Family(
        lambda: over(tiny.flux(), "FluxKontextPipeline", image_encoder=None, feature_extractor=None),
        common={"image": SMALL, "max_sequence_length": 32, "_auto_resize": False, "max_area": 1024},
        other_size=None,
        tasks=("edit",),
    ),
    "FLUX.1 Fill": Family(
        lambda: flux_with_channels("FluxFillPipeline", 48),
        common={**_MASKED, "max_sequence_length": 32},
        **_INPAINT,
    ),
    "FLUX.1 inpainting": Family(
        lambda: over(tiny.flux(), "FluxInpaintPipeline", image_encoder=None, feature_extractor=None),
        common={**_MASKED, "max_sequence_length": 32},
        **_INPAINT,
    ),
    "FLUX.1 Control": Family(
        lambda: flux_with_channels("FluxControlPipeline", 32),
        common={"control_image": SMALL, "max_sequence_length": 32},
        other_size=None,
    ),
    "FLUX.1 with a ControlNet": Family(
        lambda: over(tiny.flux(), "FluxControlNetPipeline", controlnet=flux_controlnet(1)),
        common={"control_image": SMALL, "max_sequence_length": 32},
        other_size=None,
    ),
    "FLUX.2 klein edit": Family(
        flux2_klein,
        common={"image": [PICTURE], "max_sequence_length": 16, "text_encoder_out_layers": (1, 2, 3)},
        other_size=None,
        tasks=("edit",),
    ),
    "Stable Diffusion 1.5 inpainting": Family(
        lambda: inpainting_unet(tiny.sd(), "StableDiffusionInpaintPipeline"), common=_MASKED, **_INPAINT
    ),
    "Stable Diffusion 1.5 with a ControlNet": Family(
        lambda: (
            lambda source: over(
                source, "StableDiffusionControlNetPipeline", controlnet=unet_controlnet(source.unet, 3)
            )
        )(tiny.sd()),
        common={"image": SMALL},
        other_size=None,
        tasks=("t2i",),
    ),
    "SDXL inpainting": Family(
        lambda: inpainting_unet(tiny.sdxl(), "StableDiffusionXLInpaintPipeline"), common=_MASKED, **_INPAINT
    ),
    "SDXL with a ControlNet": Family(
        lambda: (
            lambda source: over(
                source, "StableDiffusionXLControlNetPipeline", controlnet=unet_controlnet(source.unet, 3)
            )
        )(tiny.sdxl()),
        common={"image": SMALL},
        other_size=None,
        tasks=("t2i",),
    ),
    "Qwen-Image inpainting": Family(
        lambda: over(qwen_image(), "QwenImageInpaintPipeline"),
        guidance="true_cfg_scale",
        common={**_MASKED, "negative_prompt": "grey!", "max_sequence_length": 32},
        **_INPAINT,
    ),
    "Z-Image inpainting": Family(
        lambda: over(z_image(), "ZImageInpaintPipeline"),
        guidances=(0.0, 3.0, 5.0),
        common={**_MASKED, "max_sequence_length": 16},
        dtype=torch.float32,
        **_INPAINT,
    ),
    "PixArt-Alpha": Family(
        pixart_alpha,
        common={"max_sequence_length": 16, "use_resolution_binning": False, "clean_caption": False},
    ),
    "CogView 4": Family(cogview4, common={"max_sequence_length": 16}),
    "CogView 3 Plus": Family(cogview3, common={"max_sequence_length": 16}),
    "Bria 3": Family(bria, common={"max_sequence_length": 16}),
    "Lumina Next": Family(lumina_next, common={"max_sequence_length": 16, "clean_caption": False}),
    "Latte": Family(
        latte,
        common={"video_length": 4, "clean_caption": False, "mask_feature": False, "decode_chunk_size": 4},
        several="num_images_per_prompt",
        **_VIDEO,
    ),
    "Wan 2.2 A14B, image to video": Family(
        wan_a14b, common={**FRAMES, "image": SMALL}, tasks=("i2v",), **_VIDEO
    ),
    "Wan 2.2 TI2V, image to video": Family(
        lambda: over(
            wan(expand_timesteps=True), "WanImageToVideoPipeline", image_encoder=None, image_processor=None
        ),
        common={**FRAMES, "image": SMALL},
        tasks=("i2v",),
        **_VIDEO,
    ),
    "Wan 2.2 A14B, first and last frame": Family(
        wan_a14b, common={**FRAMES, "image": SMALL, "last_image": END}, tasks=("i2v",), **_VIDEO
    ),
    "Wan VACE": Family(
        wan_vace, common={**FRAMES, "reference_images": [SMALL]}, tasks=("t2v",), several=None, **_VIDEO
    ),
    "AnyFlow": Family(anyflow, common=FRAMES, **_VIDEO),
    "SkyReels-V2": Family(lambda: skyreels("SkyReelsV2Pipeline"), common=FRAMES, **_VIDEO),
    "SkyReels-V2 Diffusion Forcing": Family(
        lambda: skyreels("SkyReelsV2DiffusionForcingPipeline"),
        common={**FRAMES, "base_num_frames": 5, "overlap_history": None, "addnoise_condition": 0},
        **_VIDEO,
    ),
    "Sana Video": Family(
        sana_video,
        common={
            "frames": 5, "max_sequence_length": 16, "complex_human_instruction": None,
            "use_resolution_binning": False,
        },
        dtype=torch.float32,
        **_VIDEO,
    ),
    "LTX-Video with conditions": Family(
        lambda: over(ltx(), "LTXConditionPipeline", scheduler=_flow()),
        common={"image": SMALL, "num_frames": 9, "max_sequence_length": 16},
        tasks=("i2v",),
        **_VIDEO,
    ),
    "LTX-Video, first and last frame": Family(
        lambda: over(ltx(), "LTXConditionPipeline", scheduler=_flow()),
        common={
            **frame_arguments(diffusers.LTXConditionPipeline, SMALL, END, 9),
            "num_frames": 9, "max_sequence_length": 16,
        },
        tasks=("i2v",),
        several=None,  # diffusers 0.42 takes a last frame for one video of a prompt only
        **_VIDEO,
    ),
    "CogVideoX, image to video": Family(
        cogvideox_i2v,
        common={"image": SMALL, "num_frames": 9, "max_sequence_length": 16},
        tasks=("i2v",),
        **_VIDEO,
    ),
}  # fmt: skip
