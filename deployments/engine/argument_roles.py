"""What the arguments of diffusers' and transformers' modules mean to a batch, by parameter name."""

from __future__ import annotations

from enum import Enum


class ArgumentRole(Enum):
    """How an argument relates to the batch: B is the batch size of the call."""

    BATCH = "tensors of shape (B, ...), also inside dicts, lists and tuples"
    BATCH_DIM1 = "a tensor of shape (N, B, ...)"
    BROADCAST = "tensors of shape (B, ...), or (1, ...) for all rows of the call, also inside lists"
    ROW_VALUES = "a tensor of shape (B, ...) that steers the forward: calls match only if the rows are equal"
    RAGGED = "a list of B items that may differ: tensors, or lists of tensors and plain values"
    LAYOUT = "a list of B equal layouts without tensors; modules read the first one"
    TIMESTEP = "a tensor of shape (), (1,), (B,) or (B, tokens)"
    SHARED = "tensors without a batch dimension: calls match only if the values are equal"
    CACHE = "keys and values that a request keeps between steps: calls match only while they are not used"
    STATIC = "no tensors: calls match only if the values are equal"


# Names, because shapes are ambiguous: FLUX's img_ids are (S, 3), and a 64x96 and a 96x64 image have
# ids of equal shape and different values. An argument that is not listed here and holds a tensor keeps its
# call out of every batch.
_NAMES: dict[ArgumentRole, str] = {
    ArgumentRole.BATCH: """
        hidden_states sample x z latents
        encoder_hidden_states encoder_hidden_states_mask encoder_attention_mask attention_mask encoder_mask
        encoder_hidden_states_image encoder_hidden_states_2 encoder_attention_mask_2
        encoder_hidden_states_1 encoder_attention_mask_1
        encoder_hidden_states_t5 text_embedding_mask text_embedding_mask_t5 text_encoder_layers
        pooled_projections pooled_projection pooled_embeds pooled_text_emb text_embeds text_bth text_lens
        image_embeds image_embeddings image_latents clip_text clip_text_pooled clip_img proj_embedding
        guidance timestep_cond class_labels added_cond_kwargs time_ids added_time_ids image_meta_size style
        original_size target_size crop_coords micro_conds condition_mask additional_t_cond
        controlnet_cond controlnet_mode control_type controlnet_block_samples controls_latents
        controlnet_single_block_samples block_controlnet_hidden_states
        down_block_additional_residuals mid_block_additional_residual down_intrablock_additional_residuals
        audio_hidden_states audio_encoder_hidden_states audio_encoder_attention_mask video_coords audio_coords
        perturbation_mask video_self_attention_mask video_keyframes_mask visual_token_type_ids
        inpaint_latents control_latents control_hidden_states context_latents latent_cond effnet pixels
        image_cond_hidden_states pose_hidden_states face_pixel_values clean_hidden_states hidden_states_masks
        latents_history_short latents_history_mid latents_history_long
        latents_clean latents_history_2x latents_history_4x prior_token_id prior_token_drop
        segment_ids indicator global_hidden_states local_add_cond
        data_info camera_conditions chunk_plucker raymats frame_valid_mask cam_pos_embeds
        input_ids token_type_ids inputs_embeds
    """,
    ArgumentRole.BATCH_DIM1: "encoder_hidden_states_llama3",
    ArgumentRole.BROADCAST: "id_cond id_vit_hidden",
    ArgumentRole.ROW_VALUES: "img_mask",
    ArgumentRole.RAGGED: "cap_feats control_context siglip_feats image_noise_mask shape_list img_sizes",
    ArgumentRole.LAYOUT: "img_shapes",
    ArgumentRole.TIMESTEP: """
        timestep timesteps t timestep_r r_timestep timestep_ratio audio_timestep sigma audio_sigma
        target_timestep clean_timestep
    """,
    ArgumentRole.SHARED: """
        img_ids txt_ids image_cond_ids image_rotary_emb rotary_emb video_rotary_emb rotary_embedding freqs_cis
        latent_embeds visual_rope_pos text_rope_pos pos_embeds padding_mask ofs rope_interpolation_scale
        indices_hidden_states indices_latents_history_short indices_latents_history_mid
        indices_latents_history_long indices_latents indices_latents_clean indices_latents_history_2x
        indices_latents_history_4x control_hidden_states_scale sparse_params
        timestep_indices token_tags video_indices audio_indices text_indices
    """,
    ArgumentRole.CACHE: "kv_caches",
    ArgumentRole.STATIC: """
        return_dict attention_kwargs joint_attention_kwargs cross_attention_kwargs
        conditioning_scale control_type_idx skip_layers spatio_temporal_guidance_blocks chunk_partition
        scale_factor patch_size f_patch_size
    """,
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}
# exceptions, by class name of the module and parameter name
_MODULE_ROLES: dict[tuple[str, str], ArgumentRole] = {
    ("ZImageTransformer2DModel", "x"): ArgumentRole.RAGGED,  # lists of (C, F, H, W), or lists of such
    ("ZImageControlNetModel", "x"): ArgumentRole.RAGGED,
    ("Krea2Transformer2DModel", "position_ids"): ArgumentRole.SHARED,  # (S, 3)
    ("Ideogram4Transformer2DModel", "position_ids"): ArgumentRole.BATCH,  # (B, S, 3)
    # (B, S); the largest of all rows chooses the factors of the rotary embedding
    ("OmniGenTransformer2DModel", "position_ids"): ArgumentRole.ROW_VALUES,
    ("HiDreamImageTransformer2DModel", "img_ids"): ArgumentRole.BATCH,  # (B, S, 3)
    # its longest row says how many tokens every text becomes, and so the order of all tokens
    ("BriaFibo2Transformer2DModel", "encoder_attention_mask"): ArgumentRole.ROW_VALUES,
    # the distinct timesteps of a packed sequence, whose rows all requests of a forward have in common
    ("MiniMaxH3Transformer3DModel", "timestep"): ArgumentRole.SHARED,
    ("MiniMaxH3Transformer3DModel", "position_ids"): ArgumentRole.SHARED,  # (S, 3)
    ("SanaWMTransformer3DModel", "mask"): ArgumentRole.BATCH,  # another name of encoder_attention_mask
    ("I2VGenXLUNet", "fps"): ArgumentRole.BATCH,  # (B,)
    # a list of one number, which the module adds to all rows; it takes no longer list
    ("SkyReelsV2Transformer3DModel", "fps"): ArgumentRole.STATIC,
}

# Arguments computed before the denoising loop and only read in it: their stack is kept while the same batch
# runs. What a pipeline may write to in place (latents, timesteps) must not be listed.
LOOP_INVARIANT = frozenset(
    """
    encoder_hidden_states encoder_hidden_states_mask encoder_attention_mask encoder_hidden_states_image
    encoder_hidden_states_2 encoder_attention_mask_2 encoder_hidden_states_t5 encoder_hidden_states_llama3
    pooled_projections pooled_embeds text_embeds time_ids guidance image_cond_hidden_states text_bth
    """.split()
)

SCALAR_TYPES = (bool, int, float, str)


def role_of(module: str, argument: str) -> ArgumentRole:
    """The role of a parameter of the module class of that name; STATIC if it is not listed."""
    return listed_role(module, argument) or ArgumentRole.STATIC


def listed_role(module: str, argument: str) -> ArgumentRole | None:
    """The same, but None if the parameter is not listed."""
    return _MODULE_ROLES.get((module, argument)) or _ROLES.get(argument)
