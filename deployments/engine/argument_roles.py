"""What the arguments of diffusers' and transformers' modules mean to a batch, by parameter name."""

from __future__ import annotations

from enum import Enum


class ArgumentRole(Enum):
    """How an argument relates to the batch: B is the batch size of the call."""

    BATCH = "tensors of shape (B, ...), also inside dicts, lists and tuples"
    BATCH_DIM1 = "a tensor of shape (N, B, ...)"
    RAGGED = "a list of B tensors whose shapes may differ"
    LAYOUT = "a list of B equal layouts without tensors; modules read the first one"
    TIMESTEP = "a tensor of shape (), (1,), (B,) or (B, tokens)"
    SHARED = "tensors without a batch dimension: calls match only if the values are equal"
    STATIC = "no tensors: calls match only if the values are equal"


# Names, because shapes are ambiguous: FLUX's img_ids are (S, 3), and a 64x96 and a 96x64 image have
# ids of equal shape and different values. An argument that is not listed here and holds a tensor keeps its
# call out of every batch.
_NAMES: dict[ArgumentRole, str] = {
    ArgumentRole.BATCH: """
        hidden_states sample x z latents
        encoder_hidden_states encoder_hidden_states_mask encoder_attention_mask attention_mask
        encoder_hidden_states_image encoder_hidden_states_2 encoder_attention_mask_2
        encoder_hidden_states_t5 text_embedding_mask text_embedding_mask_t5 text_encoder_layers
        pooled_projections pooled_projection pooled_embeds text_embeds image_embeds clip_text
        clip_text_pooled clip_img proj_embedding
        guidance timestep_cond class_labels added_cond_kwargs time_ids added_time_ids image_meta_size style
        original_size target_size crop_coords condition_mask additional_t_cond
        controlnet_cond controlnet_mode control_type controlnet_block_samples
        controlnet_single_block_samples block_controlnet_hidden_states
        down_block_additional_residuals mid_block_additional_residual down_intrablock_additional_residuals
        audio_hidden_states audio_encoder_hidden_states audio_encoder_attention_mask video_coords audio_coords
        inpaint_latents control_latents control_hidden_states
        input_ids token_type_ids inputs_embeds
    """,
    ArgumentRole.BATCH_DIM1: "encoder_hidden_states_llama3",
    ArgumentRole.RAGGED: "cap_feats control_context",
    ArgumentRole.LAYOUT: "img_shapes",
    ArgumentRole.TIMESTEP: """
        timestep timesteps t timestep_r r_timestep timestep_ratio audio_timestep sigma audio_sigma
    """,
    ArgumentRole.SHARED: """
        img_ids txt_ids image_rotary_emb rotary_emb freqs_cis latent_embeds visual_rope_pos text_rope_pos
        padding_mask ofs
    """,
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}
# exceptions, by class name of the module and parameter name
_MODULE_ROLES: dict[tuple[str, str], ArgumentRole] = {
    ("ZImageTransformer2DModel", "x"): ArgumentRole.RAGGED,  # lists of (C, F, H, W)
    ("ZImageControlNetModel", "x"): ArgumentRole.RAGGED,
    # (S, 3); OmniGen's have a batch dimension and are scaled by their maximum, so they stay unlisted
    ("Krea2Transformer2DModel", "position_ids"): ArgumentRole.SHARED,
    ("HiDreamImageTransformer2DModel", "img_ids"): ArgumentRole.BATCH,  # (B, S, 3)
    ("SanaWMTransformer3DModel", "attention_mask"): ArgumentRole.STATIC,
}

# Arguments computed before the denoising loop and only read in it: their stack is kept while the same batch
# runs. What a pipeline may write to in place (latents, timesteps) must not be listed.
LOOP_INVARIANT = frozenset(
    """
    encoder_hidden_states encoder_hidden_states_mask encoder_attention_mask encoder_hidden_states_image
    encoder_hidden_states_2 encoder_attention_mask_2 encoder_hidden_states_t5 encoder_hidden_states_llama3
    pooled_projections pooled_embeds text_embeds time_ids guidance
    """.split()
)

SCALAR_TYPES = (bool, int, float, str)


def role_of(module: str, argument: str) -> ArgumentRole:
    """The role of a parameter of the module class of that name; STATIC if it is not listed."""
    return _MODULE_ROLES.get((module, argument)) or _ROLES.get(argument, ArgumentRole.STATIC)
