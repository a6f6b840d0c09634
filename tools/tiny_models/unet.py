"""The networks of the tiny Stable Diffusion models: one text encoder in three classes, and their UNets.

All of them grow from one another.  SDXL reads the text encoder's states before the last layer, without any
norm; Stable Diffusion 1.5 reads the last states after the final norm.  So the encoder is trained to give
normed states before its last layer.  With a last layer that adds nothing it is the encoder of 1.5 and, as
with the real ones, also SDXL's first; with a trained one it is SDXL's second.  So a UNet that has learned to
read one of them can read the others.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tools.tiny_models.network import CONTEXT, LATENT_CHANNELS, POOLED

# diffusers declares its models as placeholders without members, so a type checker cannot follow them
UNet = Any  # UNet2DConditionModel

TEXT_LAYERS = 5
TEXT_TOKENS = 77
LATENT_SIDE = 16
WIDTHS = (64, 128)  # at 16 x 16 and at 8 x 8; only the second attends
HEADS = 4
HEAD_SIZE = CONTEXT // HEADS
TIME_ID_WIDTH = 32  # of each of SDXL's six size numbers, and of the refiner's five
BASE_TIME_IDS, REFINER_TIME_IDS = 6, 5


def build_text_encoder(tokenizer: Any) -> CLIPTextModelWithProjection:
    """SDXL's second text encoder, untrained: 128 wide, 5 layers, pooled vectors 64 wide.

    Its final norm has no weights of its own (1 and 0, never trained), so that it can be left out.
    """
    encoder = CLIPTextModelWithProjection(_text_config(tokenizer))
    encoder.text_model.final_layer_norm.requires_grad_(False)
    start_previous_word_attention(encoder)
    return encoder


@torch.no_grad()
def start_previous_word_attention(encoder: CLIPTextModelWithProjection) -> None:
    """Start the heads of the first two layers with attention to the words one, two and three places before.

    Positions start as 16 waves, so that a head finds the word k places before by turning its own waves back.
    """
    waves = torch.linspace(0.1, 2.5, HEAD_SIZE // 2)  # radians per word
    angles = torch.arange(TEXT_TOKENS)[:, None] * waves
    embeddings: Any = encoder.text_model.embeddings
    positions = embeddings.position_embedding.weight
    positions.zero_()
    positions[:, :HEAD_SIZE:2], positions[:, 1:HEAD_SIZE:2] = angles.cos(), angles.sin()
    words = embeddings.token_embedding.weight
    words.normal_(std=0.7)
    words[:, :HEAD_SIZE] *= 0.1
    layers: Any = encoder.text_model.encoder.layers
    for layer in layers[:2]:
        for head, back in enumerate((1, 2, 3)):
            own = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
            query, key = layer.self_attn.q_proj.weight[own], layer.self_attn.k_proj.weight[own]
            query.zero_(), key.zero_()
            key[:, :HEAD_SIZE] = torch.eye(HEAD_SIZE)
            cosines, sines = (back * waves).cos(), (back * waves).sin()
            for pair in range(HEAD_SIZE // 2):
                even, odd = 2 * pair, 2 * pair + 1
                query[even, even], query[even, odd] = cosines[pair], sines[pair]
                query[odd, even], query[odd, odd] = -sines[pair], cosines[pair]


def _text_config(tokenizer: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CONTEXT,
        intermediate_size=4 * CONTEXT,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        projection_dim=POOLED,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )


@torch.no_grad()
def without_projection(encoder: CLIPTextModelWithProjection, tokenizer: Any) -> CLIPTextModel:
    """The text encoder of Stable Diffusion 1.5, which is SDXL's first: its last layer adds nothing."""
    model = CLIPTextModel(_text_config(tokenizer))
    model.load_state_dict(encoder.text_model.state_dict())
    layers: Any = model.encoder.layers
    for part in (layers[-1].self_attn.out_proj, layers[-1].mlp.fc2):
        part.weight.zero_()
        part.bias.zero_()
    return model


def token_ids(tokenizer: Any, captions: list[str], length: int = TEXT_TOKENS) -> Tensor:
    """(B, length), cut or padded to the right as diffusers does."""
    settings = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids: Tensor = tokenizer(captions, max_length=length, **settings).input_ids
    return ids


def encode_text(encoder: CLIPTextModelWithProjection, ids: Tensor) -> tuple[Tensor, Tensor]:
    """States before the last layer (B, tokens, 128) and pooled vectors (B, 64), as SDXL reads them."""
    answer = encoder(ids, output_hidden_states=True)
    return answer.hidden_states[-2], answer.text_embeds


def normed(states: Tensor) -> Tensor:
    """What the final norm makes of these states, as Stable Diffusion 1.5 reads them."""
    return nn.functional.layer_norm(states, states.shape[-1:])


# --- UNets ------------------------------------------------------------------------------------------------


def build_unet(*, context_width: int = CONTEXT, time_ids: int = 0, light: bool = False) -> UNet:
    """An untrained UNet2DConditionModel over latents (B, 16, 16, 16); it gives 0 at first.

    context_width: of the text states.  time_ids: how many size numbers SDXL passes, with the pooled text.
    light: without a middle block, and attending on the way down only (the refiner, which sees much already).
    """
    micro: dict[str, Any] = {}
    if time_ids:
        micro = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME_ID_WIDTH,
            "projection_class_embeddings_input_dim": POOLED + time_ids * TIME_ID_WIDTH,
        }
    unet: UNet = UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type=None if light else "UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D" if light else "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=WIDTHS,
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=HEADS,  # by this name diffusers means the number of heads
        cross_attention_dim=context_width,
        use_linear_projection=True,
        **micro,
    )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out")):  # every block passes its input on at first
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    if time_ids:
        nn.init.zeros_(unet.add_embedding.linear_2.weight)
        nn.init.zeros_(unet.add_embedding.linear_2.bias)
    return unet


@torch.no_grad()
def copy_weights(unet: UNet, source: UNet) -> None:
    """Start from the UNet of another family: equal shapes are copied, text columns spread or summed up.

    SDXL's two text encoders are equal, so each half of its columns starts with half of the weight, and the
    refiner, which has one encoder, starts with the sum of both.  What is new stays as built.
    """
    theirs = source.state_dict()
    for name, weight in unet.state_dict().items():
        other = theirs.get(name)
        if other is None or name.startswith("add_embedding."):
            continue
        if weight.shape == other.shape:
            weight.copy_(other)
        elif weight.shape[1] == 2 * other.shape[1]:
            weight.copy_(torch.cat([other, other], 1) / 2)
        else:
            weight.copy_(sum(other.chunk(2, 1)))
