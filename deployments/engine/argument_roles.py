"""What the arguments of diffusers' and transformers' modules mean to a batch, by name."""

from __future__ import annotations

from enum import Enum


class ArgumentRole(Enum):
    """What an argument has to do with the pictures of a call."""

    BATCH = "one entry per picture along dimension 0, also inside dicts, lists and tuples"
    BATCH_DIM1 = "a tensor with one entry per picture along dimension 1"
    RAGGED = "a list with one tensor per picture"
    LAYOUT = "a list of plain layouts, the same for every picture; models read the first one"
    TIMESTEP = "the time of each picture, or one for all; perhaps one per token, (rows, tokens)"
    SHARED = "tensors that serve the whole batch: calls match only if the values are equal"
    STATIC = "no tensors: calls match only if they are equal"


# What the arguments of diffusers' and transformers' modules mean, by name. Guessing from shapes goes
# wrong (FLUX's img_ids are (S, 3): 64x96 and 96x64 pictures have equal shapes and different ids), so
# an argument that stands in no table and holds a tensor keeps its call out of every batch.
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
_MODULE_ROLES: dict[tuple[str, str], ArgumentRole] = {  # where a module means something else than the others
    ("ZImageTransformer2DModel", "x"): ArgumentRole.RAGGED,  # lists of (C, F, H, W), as are its captions
    ("ZImageControlNetModel", "x"): ArgumentRole.RAGGED,
    (
        "Krea2Transformer2DModel",
        "position_ids",
    ): ArgumentRole.SHARED,  # (S, 3); OmniGen's are rows and set a scale
    ("HiDreamImageTransformer2DModel", "img_ids"): ArgumentRole.BATCH,  # (B, S, 3), each picture's own
    ("SanaWMTransformer3DModel", "attention_mask"): ArgumentRole.STATIC,
}

# Computed before the loop and only read in it; stacked once for as long as the same batch goes on.
# What a pipeline may write to in place (latents, timesteps) must not stand here.
LOOP_INVARIANT = frozenset(
    """
    encoder_hidden_states encoder_hidden_states_mask encoder_attention_mask encoder_hidden_states_image
    encoder_hidden_states_2 encoder_attention_mask_2 encoder_hidden_states_t5 encoder_hidden_states_llama3
    pooled_projections pooled_embeds text_embeds time_ids guidance
    """.split()
)

SCALAR_TYPES = (bool, int, float, str)


def role_of(module: str, argument: str) -> ArgumentRole:
    """What this argument is to the module of that class name; PLAIN where no table knows it."""
    return _MODULE_ROLES.get((module, argument)) or _ROLES.get(argument, ArgumentRole.STATIC)
