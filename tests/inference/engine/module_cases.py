"""Tiny denoisers with random weights that no family of the table has, and the arguments of calls to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from torch import Tensor

Arguments = dict[str, Any]


@dataclass(frozen=True)
class ModuleCase:
    """A module to build and the arguments of a call with `rows` rows; `noise` gives values of a shape."""

    kind: str  # its class
    config: Arguments
    arguments: Callable[[int, Callable[..., Tensor]], Arguments]
    rows: tuple[int, ...] = (1, 2, 1)  # of the calls that meet
    dtype: torch.dtype = torch.float64  # float32 where the module insists on it

    def build(self) -> Any:
        """The module with weights of which no layer is zero."""
        torch.manual_seed(0)
        module = getattr(diffusers, self.kind)(**self.config).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                if not parameter.abs().sum():
                    parameter.normal_(std=0.1)
        return module.to(self.dtype)


def _times(rows: int, noise: Callable[..., Tensor]) -> Tensor:
    return noise(rows).abs() * 300


def _ids(*values: float) -> Tensor:
    return torch.tensor(values).reshape(-1, 1).expand(-1, 4).double()


def glm_caches(mode: str | None) -> GlmImageKVCache:
    """An empty cache of one layer, which a forward reads or writes or leaves alone."""
    caches = GlmImageKVCache(num_layers=1)
    caches.set_mode(mode)
    return caches


_SMALL_WAN: Arguments = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}

CASES: dict[str, ModuleCase] = {
    "FLUX.3 with reference pictures": ModuleCase(
        "Flux3Transformer2DModel",
        {
            "in_channels": 8,
            "cond_in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
            "flow_map": True,
        },
        lambda rows, noise: {
            "hidden_states": noise(rows, 4, 8),
            "encoder_hidden_states": noise(rows, 3, 12),
            "timestep": noise(rows).abs(),
            "target_timestep": noise(rows).abs(),
            "img_ids": _ids(0, 1, 2, 3),
            "txt_ids": _ids(0, 1, 2),
            "image_cond_hidden_states": noise(rows, 2, 8),
            "image_cond_ids": _ids(7, 8),
        },
    ),
    "ERNIE-Image": ModuleCase(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 1,
            "ffn_hidden_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 12,
            "rope_axes_dim": (4, 6, 6),
        },
        lambda rows, noise: {
            "hidden_states": noise(rows, 4, 4, 2),
            "timestep": _times(rows, noise),
            "text_bth": noise(rows, 5, 12),
            "text_lens": torch.tensor([3 + row for row in range(rows)]),
        },
    ),
    "GLM-Image": ModuleCase(
        "GlmImageTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 12,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 32,
        },
        lambda rows, noise: {
            "hidden_states": noise(rows, 4, 4, 4),
            "encoder_hidden_states": noise(rows, 3, 12),
            "prior_token_id": torch.arange(rows * 4).reshape(rows, 4),
            "prior_token_drop": noise(rows, 4) > 0,
            "timestep": _times(rows, noise),
            "target_size": torch.full((rows, 2), 32.0).double(),
            "crop_coords": torch.zeros(rows, 2).double(),
            "kv_caches": glm_caches(None),
        },
    ),
    "Ideogram 4": ModuleCase(
        "Ideogram4Transformer2DModel",
        {
            "in_channels": 8,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "adaln_dim": 16,
            "llm_features_dim": 12,
            "mrope_section": (4, 2, 2),
        },
        lambda rows, noise: {
            "hidden_states": noise(rows, 5, 8),
            "timestep": noise(rows).abs(),
            "encoder_hidden_states": noise(rows, 5, 12),
            "position_ids": torch.arange(5).reshape(1, 5, 1).expand(rows, 5, 3),
            "segment_ids": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])[torch.arange(rows) % 2],
            "indicator": torch.tensor([[3, 3, 2, 2, 2]]).expand(rows, 5),
        },
    ),
    "Qwen-Image 2.1": ModuleCase(
        "QwenImage21Transformer2DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "context_in_dim": 12,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda rows, noise: {
            "hidden_states": noise(rows, 8, 8),
            "encoder_hidden_states": noise(rows, 4, 12),
            "timestep": noise(rows).abs(),
            "img_shapes": [[(1, 2, 2), (1, 2, 2)]] * rows,
            "img_mask": torch.tensor([[False, True, False, False, True]]).expand(rows, 5).clone(),
            "encoder_hidden_states_mask": torch.ones(rows, 4, dtype=torch.bool),
        },
    ),
    "FIBO 2 with pictures": ModuleCase(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 12,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 2,
            "max_num_gist_tokens": 4,
            "gist_step": 1,
            "gist_min_text_len": 1,
            "gist_max_text_len": 6,
            "axes_dims": (4, 6, 6),
            "axes_lens": (32, 16, 16),
        },
        lambda rows, noise: {
            "hidden_states": noise(rows, 4, 4, 4),
            "timestep": noise(rows).abs(),
            "encoder_hidden_states": noise(rows, 2, 6, 12),
            "encoder_attention_mask": torch.tensor([[True] * 5 + [False]]).expand(rows, 6).clone(),
            "context_latents": [noise(rows, 4, 4, 4), noise(rows, 4, 2, 2)],
        },
    ),
    "LTX-2": ModuleCase(
        "LTX2VideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "num_layers": 2,
            "caption_channels": 12,
            "perturbed_attn": True,
            "use_prompt_adaln_single": False,
            "use_keyframes_abs_pos_embedding": True,
            "rope_type": "split",
        },
        lambda rows, noise: {
            "hidden_states": noise(rows, 8, 4),
            "audio_hidden_states": noise(rows, 3, 4),
            "encoder_hidden_states": noise(rows, 5, 12),
            "audio_encoder_hidden_states": noise(rows, 5, 12),
            "timestep": _times(rows, noise),
            "encoder_attention_mask": torch.ones(rows, 5, dtype=torch.long),
            "audio_encoder_attention_mask": torch.ones(rows, 5, dtype=torch.long),
            "num_frames": 2,
            "height": 2,
            "width": 2,
            "audio_num_frames": 3,
            "spatio_temporal_guidance_blocks": [1],
            "perturbation_mask": (torch.arange(rows) % 2).double(),
            "video_self_attention_mask": noise(rows, 8, 8).clamp(0, 1),
            "video_keyframes_mask": (noise(rows, 8, 1) > 0).double(),
        },
    ),
    "Helios": ModuleCase(
        "HeliosTransformer3DModel",
        {
            **{k: v for k, v in _SMALL_WAN.items() if k != "rope_max_seq_len"},
            "in_channels": 4,
            "out_channels": 4,
        }
        | {"rope_dim": (4, 4, 4)},
        lambda rows, noise: {
            "hidden_states": noise(rows, 4, 2, 4, 4),
            "timestep": _times(rows, noise),
            "encoder_hidden_states": noise(rows, 3, 16),
            "indices_hidden_states": torch.tensor([[7, 8]]),
            "indices_latents_history_short": torch.tensor([[5, 6]]),
            "indices_latents_history_mid": torch.tensor([[3, 4]]),
            "indices_latents_history_long": torch.tensor([[0, 1, 2]]),
            "latents_history_short": noise(rows, 4, 2, 4, 4),
            "latents_history_mid": noise(rows, 4, 2, 4, 4),
            "latents_history_long": noise(rows, 4, 3, 4, 4),
        },
    ),
    "FramePack": ModuleCase(
        "HunyuanVideoFramepackTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 12,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4),
            "has_image_proj": True,
            "image_proj_dim": 8,
            "has_clean_x_embedder": True,
        },
        lambda rows, noise: {
            "hidden_states": noise(rows, 4, 2, 4, 4),
            "timestep": _times(rows, noise),
            "encoder_hidden_states": noise(rows, 5, 12),
            "encoder_attention_mask": torch.tensor([[True] * 4 + [False]]).expand(rows, 5),
            "pooled_projections": noise(rows, 8),
            "image_embeds": noise(rows, 3, 8),
            "indices_latents": torch.tensor([4, 5]),
            "guidance": noise(rows).abs(),
            "latents_clean": noise(rows, 4, 2, 4, 4),
            "indices_latents_clean": torch.tensor([0, 3]),
            "latents_history_2x": noise(rows, 4, 2, 4, 4),
            "indices_latents_history_2x": torch.tensor([1, 2]),
            "latents_history_4x": noise(rows, 4, 4, 8, 8),
            "indices_latents_history_4x": torch.tensor([0, 1, 2, 3]),
        },
    ),
    "ConsisID": ModuleCase(
        "ConsisIDTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 12,
            "num_layers": 2,
            "sample_width": 4,
            "sample_height": 4,
            "sample_frames": 5,
            "max_text_seq_length": 3,
            "is_train_face": True,
            "cross_attn_interval": 1,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 6,
            "LFE_vit_dim": 6,
            "LFE_depth": 2,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 2,
            "LFE_output_dim": 32,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        lambda rows, noise: {
            "hidden_states": noise(rows, 2, 4, 4, 4),
            "encoder_hidden_states": noise(rows, 3, 12),
            "timestep": _times(rows, noise),
            "id_cond": noise(1, 6),
            "id_vit_hidden": [noise(1, 2, 6)],
        },
    ),
    "OmniGen": ModuleCase(
        "OmniGenTransformer2DModel",
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "num_layers": 1,
            "pad_token_id": 0,
            "vocab_size": 32,
            "time_step_dim": 16,
            "rope_scaling": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
        },
        lambda rows, noise: {
            "hidden_states": noise(rows, 4, 4, 4),
            "timestep": noise(rows).abs(),
            "input_ids": torch.arange(rows * 3).reshape(rows, 3),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(rows, 8, 8, dtype=torch.long),
            "position_ids": torch.arange(8).expand(rows, 8),
        },
        dtype=torch.float32,
    ),
    "SkyReels-V2, diffusion forcing": ModuleCase(
        "SkyReelsV2Transformer3DModel",
        {**_SMALL_WAN, "in_channels": 4, "out_channels": 4, "inject_sample_info": True},
        lambda rows, noise: {
            "hidden_states": noise(rows, 4, 2, 4, 4),
            "timestep": torch.stack([_times(rows, noise), _times(rows, noise)], 1),
            "encoder_hidden_states": noise(rows, 3, 16),
            "enable_diffusion_forcing": True,
            "fps": [1] * rows,
        },
        rows=(1, 1, 1),  # with such information the module itself takes one row only
    ),
    "Wan VACE": ModuleCase(
        "WanVACETransformer3DModel",
        {**_SMALL_WAN, "in_channels": 4, "out_channels": 4, "vace_layers": [0, 1], "vace_in_channels": 6},
        lambda rows, noise: {
            "hidden_states": noise(rows, 4, 2, 4, 4),
            "timestep": _times(rows, noise),
            "encoder_hidden_states": noise(rows, 3, 16),
            "control_hidden_states": noise(rows, 6, 2, 4, 4),
            "control_hidden_states_scale": torch.tensor([1.0, 0.5]).double(),
        },
    ),
    "Wan Animate": ModuleCase(
        "WanAnimateTransformer3DModel",
        {
            **_SMALL_WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "out_channels": 4,
            "image_dim": 8,
            "motion_encoder_size": 16,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        lambda rows, noise: {
            "hidden_states": noise(rows, 12, 3, 4, 4),
            "timestep": _times(rows, noise),
            "encoder_hidden_states": noise(rows, 3, 16),
            "encoder_hidden_states_image": noise(rows, 2, 8),
            "pose_hidden_states": noise(rows, 4, 2, 4, 4),
            "face_pixel_values": noise(rows, 3, 5, 16, 16),
        },
    ),
    "AnyFlow": ModuleCase(
        "AnyFlowTransformer3DModel",
        {**_SMALL_WAN, "in_channels": 4, "out_channels": 4},
        lambda rows, noise: {
            "hidden_states": noise(rows, 2, 4, 4, 4),
            "timestep": torch.stack([_times(rows, noise), _times(rows, noise)], 1),
            "r_timestep": torch.stack([_times(rows, noise), _times(rows, noise)], 1),
            "encoder_hidden_states": noise(rows, 3, 16),
        },
    ),
    "Kandinsky 6": ModuleCase(
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 12,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (4, 6, 6),
            "in_audio_dim": 4,
            "out_audio_dim": 4,
            "visual_token_type_num_embeddings": 2,
        },
        lambda rows, noise: {
            "hidden_states": noise(rows, 2, 4, 4, 9),
            "encoder_hidden_states": noise(rows, 3, 12),
            "pooled_projections": noise(rows, 8),
            "timestep": _times(rows, noise),
            "audio_hidden_states": noise(rows, 5, 4),
            "visual_rope_pos": (torch.arange(2), torch.arange(2), torch.arange(2)),
            "encoder_attention_mask": torch.tensor([[True, True, False]]).expand(rows, 3),
            "visual_token_type_ids": (noise(rows, 2) > 0).long(),
        },
    ),
    "MiniMax H3": ModuleCase(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "ffn_dim": 32,
            "in_channels": 4,
            "audio_in_channels": 4,
            "text_dim": 12,
            "freq_dim": 16,
            "time_embed_hidden_dim": 24,
            "time_embed_dim": 12,
            "rope_freq_dim": 2,
        },
        lambda rows, noise: {
            "hidden_states": noise(rows, 2, 16),
            "audio_hidden_states": noise(rows, 2, 4),
            "encoder_hidden_states": noise(rows, 3, 12),
            "timestep": torch.tensor([0.0, 0.4]).double(),
            "timestep_indices": torch.tensor([0, 0, 0, 1, 1, 1, 1]),
            "token_tags": torch.tensor([1, 1, 1, 0, 0, 2, 2]),
            "position_ids": torch.arange(7).reshape(7, 1).expand(7, 3),
            "video_indices": torch.tensor([3, 4]),
            "audio_indices": torch.tensor([5, 6]),
            "text_indices": torch.tensor([0, 1, 2]),
        },
    ),
    "SANA-WM": ModuleCase(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "linear_head_dim": 16,
            "chunk_plucker_channels": 6,
            "chunk_plucker_post_attn_blocks": 1,
            "softmax_every_n": 2,
            "caption_channels": 12,
            "image_size": 8,
        },
        lambda rows, noise: {
            "hidden_states": noise(rows, 4, 2, 4, 4),
            "timestep": torch.stack([_times(rows, noise), _times(rows, noise)], 1)[:, None],
            "encoder_hidden_states": noise(rows, 1, 3, 12),
            "mask": torch.tensor([[1, 1, 0]]).expand(rows, 3),
            "camera_conditions": noise(rows, 2, 20),
            "chunk_plucker": noise(rows, 6, 2, 4, 4),
        },
        dtype=torch.float32,
    ),
    "JoyImage Edit Plus": ModuleCase(
        "JoyImageEditPlusTransformer3DModel",
        {
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 12,
            "num_layers": 1,
            "rope_dim_list": [4, 6, 6],
        },
        lambda rows, noise: {
            "hidden_states": noise(rows, 6, 4, 1, 2, 2),
            "timestep": _times(rows, noise),
            "encoder_hidden_states": noise(rows, 3, 12),
            "encoder_hidden_states_mask": torch.ones(rows, 3, dtype=torch.long),
            "shape_list": [[(1, 2, 2), (1, 1, 2)]] * rows,
        },
    ),
    "Z-Image Omni": ModuleCase(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 12,
            "siglip_feat_dim": 8,
            "axes_dims": [8, 4, 4],
            "axes_lens": [256, 32, 32],
        },
        lambda rows, noise: {
            "x": [[noise(4, 1, 4, 4), noise(4, 1, 4, 4)] for _ in range(rows)],
            "t": noise(rows).abs(),
            "cap_feats": [[noise(3, 12), noise(2, 12), noise(1, 12)] for _ in range(rows)],
            "siglip_feats": [[noise(2, 2, 8), None] for _ in range(rows)],
            "image_noise_mask": [[0, 1]] * rows,
        },
        dtype=torch.float32,
    ),
    "I2VGen-XL": ModuleCase(
        "I2VGenXLUNet",
        {
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
        },
        lambda rows, noise: {
            "sample": noise(rows, 4, 2, 8, 8),
            "timestep": _times(rows, noise),
            "fps": torch.tensor([16] * rows),
            "image_latents": noise(rows, 4, 2, 8, 8),
            "image_embeddings": noise(rows, 8),
            "encoder_hidden_states": noise(rows, 3, 8),
        },
    ),
    "Stable Cascade": ModuleCase(
        "StableCascadeUNet",
        {
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 8,
            "conditioning_dim": 8,
            "block_out_channels": (8, 16),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "clip_text_in_channels": 12,
            "clip_text_pooled_in_channels": 12,
            "clip_image_in_channels": 12,
            "effnet_in_channels": 4,
            "pixel_mapper_in_channels": 3,
        },
        lambda rows, noise: {
            "sample": noise(rows, 4, 8, 8),
            "timestep_ratio": noise(rows).abs(),
            "clip_text_pooled": noise(rows, 1, 12),
            "clip_text": noise(rows, 3, 12),
            "clip_img": noise(rows, 1, 12),
            "effnet": noise(rows, 4, 4, 4),
            "pixels": noise(rows, 3, 8, 8),
        },
    ),
    "aMUSEd": ModuleCase(
        "UVit2DModel",
        {
            "hidden_size": 16,
            "cond_embed_dim": 8,
            "micro_cond_encode_dim": 4,
            "micro_cond_embed_dim": 20,
            "encoder_hidden_size": 8,
            "vocab_size": 32,
            "codebook_size": 16,
            "in_channels": 8,
            "block_out_channels": 8,
            "num_res_blocks": 1,
            "block_num_heads": 2,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        },
        lambda rows, noise: {
            "input_ids": (noise(rows, 4, 4).abs() * 10).long().clamp(0, 15),
            "encoder_hidden_states": noise(rows, 3, 8),
            "pooled_text_emb": noise(rows, 8),
            "micro_conds": noise(rows, 5),
        },
        dtype=torch.float32,
    ),
    "Lumina Next": ModuleCase(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 4,
            "hidden_size": 32,
            "num_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "cross_attention_dim": 12,
        },
        lambda rows, noise: {
            "hidden_states": noise(rows, 4, 4, 4),
            "timestep": noise(rows).abs(),
            "encoder_hidden_states": noise(rows, 3, 12),
            "encoder_mask": torch.tensor([[1, 1, 0]]).expand(rows, 3),
            "image_rotary_emb": torch.polar(torch.ones(8, 8, 8), torch.arange(512.0).reshape(8, 8, 8)),
            "cross_attention_kwargs": {},
        },
    ),
    "Stable Audio": ModuleCase(
        "StableAudioDiTModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 2,
            "cross_attention_dim": 16,
            "time_proj_dim": 8,
            "global_states_input_dim": 12,
            "cross_attention_input_dim": 12,
        },
        lambda rows, noise: {
            "hidden_states": noise(rows, 4, 5),
            "timestep": noise(rows).abs(),
            "encoder_hidden_states": noise(rows, 3, 12),
            "global_hidden_states": noise(rows, 1, 12),
            "rotary_embedding": (torch.ones(6, 4).double(), torch.zeros(6, 4).double()),
        },
    ),
}
