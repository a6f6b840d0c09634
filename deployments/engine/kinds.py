"""What the arguments of diffusers' and transformers' modules mean to a batch, by name."""

from __future__ import annotations

from enum import Enum


class Kind(Enum):
    """What an argument has to do with the pictures of a call."""

    ROWS = "one entry per picture along dimension 0, also inside dicts, lists and tuples"
    SECOND = "a tensor with one entry per picture along dimension 1"
    ENTRIES = "a list with one tensor per picture"
    LAYOUT = "a list of plain layouts, the same for every picture; models read the first one"
    STEPS = "the time of each picture, or one for all; perhaps one per token, (rows, tokens)"
    SHARED = "tensors that serve the whole batch: calls match only if the values are equal"
    PLAIN = "no tensors: calls match only if they are equal"


# What the arguments of diffusers' and transformers' modules mean, by name. Guessing from shapes goes
# wrong (FLUX's img_ids are (S, 3): 64x96 and 96x64 pictures have equal shapes and different ids), so
# an argument that stands in no table and holds a tensor keeps its call out of every batch.
_NAMES: dict[Kind, str] = {
    Kind.ROWS: """
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
    Kind.SECOND: "encoder_hidden_states_llama3",
    Kind.ENTRIES: "cap_feats control_context",
    Kind.LAYOUT: "img_shapes",
    Kind.STEPS: """
        timestep timesteps t timestep_r r_timestep timestep_ratio audio_timestep sigma audio_sigma
    """,
    Kind.SHARED: """
        img_ids txt_ids image_rotary_emb rotary_emb freqs_cis latent_embeds visual_rope_pos text_rope_pos
        padding_mask ofs
    """,
}
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names.split()}
_OWN_KINDS: dict[tuple[str, str], Kind] = {  # where a module means something else than the others
    ("ZImageTransformer2DModel", "x"): Kind.ENTRIES,  # lists of (C, F, H, W), as are its captions
    ("ZImageControlNetModel", "x"): Kind.ENTRIES,
    ("Krea2Transformer2DModel", "position_ids"): Kind.SHARED,  # (S, 3); OmniGen's are rows and set a scale
    ("HiDreamImageTransformer2DModel", "img_ids"): Kind.ROWS,  # (B, S, 3), each picture's own
    ("SanaWMTransformer3DModel", "attention_mask"): Kind.PLAIN,
}

# Computed before the loop and only read in it; stacked once for as long as the same batch goes on.
# What a pipeline may write to in place (latents, timesteps) must not stand here.
CONSTANT = frozenset(
    """
    encoder_hidden_states encoder_hidden_states_mask encoder_attention_mask encoder_hidden_states_image
    encoder_hidden_states_2 encoder_attention_mask_2 encoder_hidden_states_t5 encoder_hidden_states_llama3
    pooled_projections pooled_embeds text_embeds time_ids guidance
    """.split()
)

PLAIN_TYPES = (bool, int, float, str)


def kind_of(module: str, argument: str) -> Kind:
    """What this argument is to the module of that class name; PLAIN where no table knows it."""
    return _OWN_KINDS.get((module, argument)) or _KINDS.get(argument, Kind.PLAIN)
