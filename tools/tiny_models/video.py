"""The networks of the tiny Wan: text encoder, transformer, and its training forward."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from tools.tiny_models.scenes import BASE_SHAPES, COLOURS
from tools.tiny_models.video_autoencoder import LATENT_CHANNELS, LATENT_FRAMES, LATENT_PX
from tools.tiny_models.video_scenes import FILLERS, MOTIONS, OPENINGS, SIZES, Clip, caption, draw_clip
from tools.tiny_models.vocabulary import t5_tokenizer

VideoTransformer = Any  # WanTransformer3DModel; diffusers declares its models without members

CONTEXT = 128  # UMT5's width
HEADS, HEAD_SIZE = 8, 20
NEIGHBOURS = ((0, 0, -1), (0, 0, 1), (0, -1, 0), (0, 1, 0), (-1, 0, 0), (1, 0, 0))  # frames, rows, columns
GAIN = 1.4  # of what a head fetches against a token's own, which it is compared with
LAYERS = 5
TOKENS = 24  # every training caption is shorter
ATTRIBUTES: dict[str, list[str | None]] = {  # what a caption names, with the possible values
    "shape": list(BASE_SHAPES),
    "colour": list(COLOURS),
    "background": list(COLOURS),
    "motion": list(MOTIONS),
    "size": [None, *SIZES],
}


# --- text -------------------------------------------------------------------------------------------------


def video_tokenizer(captions: int) -> Any:
    """A T5Tokenizer that knows every word of this many captions whole."""
    random = Random(1)
    texts = [caption(draw_clip(seed), random, plain=True) for seed in range(captions)]
    counts: Counter[str] = Counter()
    for text in (*texts, *OPENINGS, *FILLERS):
        counts.update(re.findall(r"[a-z]+|[^\sa-z]", text))
    return t5_tokenizer(dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))))


@dataclass(frozen=True, slots=True)
class VideoText:
    """The text encoder of a WanPipeline and its tokenizer."""

    encoder: UMT5EncoderModel
    tokenizer: Any

    def encode(self, captions: list[str], length: int = TOKENS) -> tuple[Tensor, Tensor]:
        """Context (B, length, 128), zero where there is no token, and how many tokens there are (B)."""
        settings = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer(captions, max_length=length, **settings)
        mask = tokens.attention_mask
        context: Tensor = self.encoder(tokens.input_ids, mask)[0] * mask[..., None]
        return context, mask.sum(1)


def build_text_encoder(tokenizer: Any) -> UMT5EncoderModel:
    """An untrained UMT5 that fits the tokenizer: 128 wide, 4 layers."""
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=CONTEXT,
            d_kv=32,
            d_ff=2 * CONTEXT,
            num_layers=4,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    with torch.no_grad():
        blocks: Any = encoder.encoder.block
        for block in blocks:
            _start_neighbour_attention(block.layer[0].SelfAttention.relative_attention_bias.weight)
    return encoder


def _start_neighbour_attention(bias: Tensor) -> None:
    """Start four heads with attention to the previous word, the next word, all words before, all after.

    bias: (32 buckets, 4 heads); see network.start_neighbour_attention, which does so for T5.
    """
    before, behind = torch.arange(16), torch.arange(16, 32)
    decay = -0.4 * torch.arange(16).float()
    bias.zero_()
    bias[before[1], 0] = bias[behind[1], 1] = 5.0
    bias[before, 2], bias[behind, 2] = decay, -4.0
    bias[before, 3], bias[behind, 3] = -4.0, decay


class VideoCaptionParser(nn.Module):
    """Predicts each attribute from the text encoder's output, to train it to parse.  Not exported."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(ATTRIBUTES), CONTEXT))
        self.attention = nn.MultiheadAttention(CONTEXT, 4, batch_first=True)
        self.norm = nn.LayerNorm(CONTEXT)
        self.answers = nn.ModuleList(nn.Linear(CONTEXT, len(answers)) for answers in ATTRIBUTES.values())

    def forward(self, context: Tensor, counts: Tensor) -> list[Tensor]:
        """The logits of each attribute, (B, answers); context and counts as VideoText.encode gives them."""
        queries = self.queries.expand(len(context), -1, -1)
        padding = torch.arange(context.shape[1]) >= counts[:, None]
        found, _ = self.attention(queries, context, context, key_padding_mask=padding, need_weights=False)
        found = self.norm(found)
        return [answer(found[:, index]) for index, answer in enumerate(self.answers)]


def attribute_labels(clips: list[Clip]) -> Tensor:
    """The right answers, (B, 5): for each attribute the index in ATTRIBUTES."""
    rows = [[answers.index(getattr(clip, name)) for name, answers in ATTRIBUTES.items()] for clip in clips]
    return torch.tensor(rows)


# --- transformer ------------------------------------------------------------------------------------------


def build_transformer() -> VideoTransformer:
    """An untrained WanTransformer3DModel, 160 wide, 5 layers; it gives 0 at first."""
    transformer: VideoTransformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=CONTEXT,
        ffn_dim=4 * HEADS * HEAD_SIZE,
        num_layers=LAYERS,
        rope_max_seq_len=64,
    )
    for name, weight in transformer.named_parameters():
        modulates = "scale_shift_table" in name or "time_proj" in name
        if modulates or name.startswith("proj_out") or "attn2.to_out" in name:
            nn.init.zeros_(weight)
        elif weight.ndim == 2 and "blocks" in name:
            nn.init.normal_(weight, std=0.7 * weight.shape[1] ** -0.5)
    set_position_sense(transformer)
    return transformer


@torch.no_grad()
def set_position_sense(transformer: VideoTransformer) -> None:
    """Make the first block find out which tokens lie at the edges of picture and time; it stays so.

    Wan's rotary embedding gives tokens only the distance to others, and pure noise looks alike everywhere, so
    they cannot learn their own position.  So a head attends to the next token on one side, or to the token
    itself where there is none, and the feed-forward part compares the result with the token's own noise.
    When this was left to training, objects still appeared anywhere, and several of them, after 400 steps.

    Of a token's dimensions the first 64 hold its latents, then come what six heads fetched, then their flags.
    The time's modulation, which all blocks share, would disturb this and is left out: how much noise there
    is shows in the latents.
    """
    latents, first = 4 * LATENT_CHANNELS, transformer.blocks[0]
    _freeze(transformer.patch_embedding, first, transformer.condition_embedder.time_proj)
    for dimension in range(latents):
        channel, row, column = dimension // 4, dimension // 2 % 2, dimension % 2
        transformer.patch_embedding.weight[dimension, channel, 0, row, column] = 1
    _attend_to_neighbours(first.attn1)
    first.scale_shift_table[:, 2] = first.scale_shift_table[:, 5] = 1  # the gates of its two parts
    width = latents // len(NEIGHBOURS)
    for head in range(len(NEIGHBOURS)):
        own = torch.arange(width) + head * width
        values, fetched, flag = own - own[0] + head * HEAD_SIZE, latents + own, latents * 2 + head
        first.attn1.to_v.weight[values, own] = 1
        first.attn1.to_out[0].weight[fetched, values] = 1
        first.ffn.net[2].bias[flag] = 2
        for part, sign in enumerate((1, -1)):  # gelu(x) + gelu(-x) is nearly |x|
            units = 2 * own[0] + part * width + torch.arange(width)
            first.ffn.net[0].proj.weight[units, own] = GAIN * sign
            first.ffn.net[0].proj.weight[units, fetched] = -1.0 * sign
            first.ffn.net[2].weight[flag, units] = -4 / width


def _freeze(*parts: nn.Module) -> None:
    """Set all weights but those of norms to 0 and keep them out of training."""
    for part in parts:
        for name, weight in part.requires_grad_(False).named_parameters():
            if "norm" not in name:
                weight.zero_()


def _attend_to_neighbours(part: Any) -> None:
    """Make each head attend to the token that is so many frames, rows and columns away."""
    space = 2 * (HEAD_SIZE // 6)  # channels of a head that rotate with the row, and with the column
    axes = (0, HEAD_SIZE - 2 * space, HEAD_SIZE - space)  # the first pair of each axis turns fastest
    for head, offsets in enumerate(NEIGHBOURS):
        for first, offset in zip(axes, offsets, strict=True):
            pair = slice(head * HEAD_SIZE + first, head * HEAD_SIZE + first + 2)  # one radian per step
            part.to_q.bias[pair] = torch.tensor([1.0, 0.0])
            part.to_k.bias[pair] = torch.tensor([math.cos(offset), -math.sin(offset)])
    part.norm_q.weight.fill_(2.0)  # sharper
    part.norm_k.weight.fill_(2.0)


class VideoFlow:
    """The transformer's forward for training: bf16 blocks (compiled if asked), time in fp32.

    WanPipeline pads its context with zeros that the transformer attends to, so its output depends on
    max_sequence_length.  Here the few zeros at the end stand for any number: `padding` is added to their
    attention logits (the logarithm of how many each stands for).
    """

    def __init__(self, transformer: VideoTransformer, *, compiled: bool = False) -> None:
        self.transformer = transformer
        self.block = torch.compile(_block, dynamic=False) if compiled else _block
        torch._dynamo.config.recompile_limit = 64  # noqa: SLF001  one graph per block
        shape = torch.empty(1, 1, LATENT_FRAMES, LATENT_PX, LATENT_PX)
        cosine, sine = transformer.rope(shape)
        self.angles = cosine[..., 0::2].bfloat16(), sine[..., 1::2].bfloat16()  # (1, tokens, 1, 20)

    def __call__(self, latents: Tensor, context: Tensor, padding: Tensor, time: Tensor) -> Tensor:
        """The velocity noise - video at time 0..1; fp32.

        latents: (B, 16, 5, 8, 8); context: (B, 24, 128); padding: (B, 24); time: (B).
        """
        net, count = self.transformer, len(latents)
        embedder = net.condition_embedder
        embedded = embedder.time_embedder(embedder.timesteps_proj(1000 * time))
        modulation = embedder.time_proj(nn.functional.silu(embedded)).unflatten(1, (6, -1))
        with torch.autocast("cpu", torch.bfloat16):
            text = embedder.text_embedder(context)
            tokens = net.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()
            for block in net.blocks:
                tokens = self.block(block, tokens, text, padding.bfloat16(), modulation, self.angles)
            shift, scale = (net.scale_shift_table + embedded[:, None]).chunk(2, 1)
            tokens = net.norm_out(tokens.float()) * (1 + scale) + shift
            answer = net.proj_out(tokens).float()
        side = LATENT_PX // 2
        patches: Tensor = answer.view(count, LATENT_FRAMES, side, side, 2, 2, LATENT_CHANNELS)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(latents.shape)


def _block(
    block: Any,
    tokens: Tensor,
    text: Tensor,
    padding: Tensor,
    modulation: Tensor,
    angles: tuple[Tensor, Tensor],
) -> Tensor:
    """WanTransformerBlock.forward, its attention written out: faster to train on a CPU (see network.py)."""
    shift, scale, gate, shift_2, scale_2, gate_2 = (
        (block.scale_shift_table + modulation).bfloat16().chunk(6, 1)
    )
    normal = block.norm1(tokens) * (1 + scale) + shift
    tokens = tokens + gate * _attention(block.attn1, normal, normal, None, angles)
    tokens = tokens + _attention(block.attn2, block.norm2(tokens), text, padding, None)
    normal = block.norm3(tokens) * (1 + scale_2) + shift_2
    answer: Tensor = tokens + gate_2 * block.ffn(normal)
    return answer


def _attention(
    part: Any, x: Tensor, context: Tensor, padding: Tensor | None, angles: tuple[Tensor, Tensor] | None
) -> Tensor:
    split = (HEADS, HEAD_SIZE)
    query = _normed(part.norm_q, part.to_q(x)).unflatten(-1, split)
    key = _normed(part.norm_k, part.to_k(context)).unflatten(-1, split)
    value = part.to_v(context).unflatten(-1, split)
    if angles is not None:
        query, key = _rotated(query, angles), _rotated(key, angles)
    query, key, value = (piece.transpose(1, 2) for piece in (query, key, value))  # (B, heads, tokens, 40)
    logits = torch.matmul(query * HEAD_SIZE**-0.5, key.transpose(-1, -2))
    if padding is not None:
        logits = logits + padding[:, None, None]
    mixed = torch.matmul(logits.softmax(-1).to(value.dtype), value).transpose(1, 2).flatten(2)
    answer: Tensor = part.to_out[0](mixed)
    return answer


def _normed(norm: Any, x: Tensor) -> Tensor:
    """In the precision of x: the fused norm takes no other."""
    return nn.functional.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def _rotated(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """x: (B, tokens, heads, 40); the halves stand for diffusers' even and odd channels."""
    (cosine, sine), (even, odd) = angles, (x[..., 0::2], x[..., 1::2])
    return torch.cat([even * cosine - odd * sine, odd * cosine + even * sine], -1)
