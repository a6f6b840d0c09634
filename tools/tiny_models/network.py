"""The networks of the tiny FLUX: text encoders and transformer, and their training forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from tools.tiny_models.scenes import (
    COLOURS,
    PATTERNS,
    PICTURE_PX,
    PLACES,
    SHAPES,
    SIZES,
    TOKEN_PX,
    Scene,
    cell_map,
    mentioned,
)

# diffusers declares its models as placeholders without members, so a type checker cannot follow them
Transformer = Any  # FluxTransformer2DModel
Autoencoder = Any  # AutoencoderKL
Pipeline = Any  # FluxPipeline

LATENT_CHANNELS = 16
LATENT_SIDE = PICTURE_PX // 8
CELLS = PICTURE_PX // TOKEN_PX  # 8 x 8 picture tokens
POOLED = 64  # CLIP's width
CONTEXT = 128  # T5's width
HEADS, HEAD_SIZE = 4, 40
CELL_CLASSES = (len(SHAPES) + 1, len(COLOURS), len(PATTERNS) + 1)  # what a picture token may show
MENTIONED_KINDS = (PLACES + 1, len(SIZES) + 1)  # what a caption may name of one object
ROPE_AXES = (4, 18, 18)  # the first axis is always 0, so it gets the minimum; then rows, columns


@dataclass(frozen=True, slots=True)
class TextEncoders:
    """The two encoders of a FluxPipeline and their tokenizers."""

    clip: CLIPTextModel
    t5: T5EncoderModel
    clip_tokenizer: Any
    t5_tokenizer: Any

    def tokens(self, captions: list[str], length: int) -> tuple[Tensor, Tensor]:
        """CLIP ids (B, 32) and T5 ids (B, length), cut or padded to the right."""
        settings = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        clip_ids: Tensor = self.clip_tokenizer(captions, max_length=32, **settings).input_ids
        t5_ids: Tensor = self.t5_tokenizer(captions, max_length=length, **settings).input_ids
        return clip_ids, t5_ids

    def encode(self, captions: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Pooled vector (B, 64) and context (B, length, 128); like FluxPipeline, no mask for T5's padding."""
        clip_ids, t5_ids = self.tokens(captions, length)
        return self.clip(clip_ids).pooler_output, self.t5(t5_ids)[0]


def build_text_encoders(clip_tokenizer: Any, t5_tokenizer: Any) -> TextEncoders:
    """Untrained encoders that fit the tokenizers: CLIP 64 wide, 2 layers; T5 128 wide, 4 layers."""
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=POOLED,
            intermediate_size=2 * POOLED,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=POOLED,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
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
    start_neighbour_attention(t5)
    return TextEncoders(clip, t5, clip_tokenizer, t5_tokenizer)


@torch.no_grad()
def start_neighbour_attention(t5: T5EncoderModel) -> None:
    """Start the four heads with attention to the previous word, the next word, all words before, all after.

    FLUX gives its text tokens no position, so only these biases encode word order.  From T5's own start
    they need thousands of steps to grow; from this one, colours are bound to their nouns within hundreds.
    """
    blocks: Any = t5.encoder.block  # the first one holds the biases of all
    bias = blocks[0].layer[0].SelfAttention.relative_attention_bias.weight  # (32 buckets, 4 heads)
    before, behind = (
        torch.arange(16),
        torch.arange(16, 32),
    )  # bucket k or 16 + k: k words away, from 8 on coarser
    bias.zero_()
    bias[before[1], 0] = 5.0
    bias[behind[1], 1] = 5.0
    decay = -0.4 * torch.arange(16).float()
    bias[before, 2], bias[behind, 2] = decay, -4.0
    bias[before, 3], bias[behind, 3] = -4.0, decay


def build_transformer(*, guidance: bool = False) -> Transformer:
    """An untrained FluxTransformer2DModel, 160 wide, 2 double and 4 single blocks; it gives 0 at first."""
    transformer: Transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=HEAD_SIZE,
        num_attention_heads=HEADS,
        joint_attention_dim=CONTEXT,
        pooled_projection_dim=POOLED,
        guidance_embeds=guidance,
        axes_dims_rope=ROPE_AXES,
    )
    for name, weight in transformer.named_parameters():
        modulates = "norm" in name and "linear" in name
        if modulates or name.startswith("proj_out"):
            nn.init.zeros_(weight)
        elif weight.ndim == 2 and "blocks" in name:
            nn.init.normal_(weight, std=0.7 * weight.shape[1] ** -0.5)
    if guidance:
        nn.init.zeros_(transformer.time_text_embed.guidance_embedder.linear_2.weight)
        nn.init.zeros_(transformer.time_text_embed.guidance_embedder.linear_2.bias)
    return transformer


@torch.no_grad()
def with_guidance_built_in(guided: Transformer, scale: float) -> Transformer:
    """A transformer that always does what `guided`, one with a guidance embedding, does at this scale.

    The embedding of one scale is one vector, added to that of the prompt: it moves into its last bias.
    """
    answer = build_transformer()
    embedding = guided.time_text_embed
    vector = embedding.guidance_embedder(embedding.time_proj(torch.tensor([scale * 1000])))[0]
    state = guided.state_dict()
    state["time_text_embed.text_embedder.linear_2.bias"] = embedding.text_embedder.linear_2.bias + vector
    answer.load_state_dict({name: state[name] for name in answer.state_dict()})
    return answer


def pack(latents: Tensor) -> Tensor:
    """Fold 2x2 latent patches into tokens, as FluxPipeline does: (B, 16, 16, 16) -> (B, 64, 64)."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height // 2 * width // 2, channels * 4)


class CaptionParser(nn.Module):
    """Predicts from the encoders' output what each of the 64 picture tokens shows, to train them to parse.

    One learned query per token attends to T5's output once, so T5 has to bind colour to shape and order to
    place by itself.  One more predicts which place and size are named: "in the center" shows the same as no
    place, but seeds move only the latter.  CLIP's pooled vector alone answers for background, first object,
    place and size.  Not exported.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(CELLS * CELLS + 1, CONTEXT))
        self.attention = nn.MultiheadAttention(CONTEXT, 4, batch_first=True)
        self.norm = nn.LayerNorm(CONTEXT)
        self.cells = nn.Linear(CONTEXT, sum(CELL_CLASSES))
        self.mentioned = nn.Linear(CONTEXT, sum(MENTIONED_KINDS))
        self.summary = nn.Linear(POOLED, len(SHAPES) + 2 * len(COLOURS) + sum(MENTIONED_KINDS))

    def forward(self, pooled: Tensor, context: Tensor, cells: Tensor, mentioned: Tensor) -> Tensor:
        """Cross entropy of the parse; cells: (B, 64, 3), the indices of scenes.cell_map; mentioned: (B, 2),
        those of scenes.mentioned."""
        queries = self.queries.expand(len(context), -1, -1)
        found = self.norm(self.attention(queries, context, context, need_weights=False)[0])
        per_cell = _cross_entropies(self.cells(found[:, :-1]).split(CELL_CLASSES, -1), cells)
        mentioned_loss = _cross_entropies(self.mentioned(found[:, -1]).split(MENTIONED_KINDS, -1), mentioned)
        first = (cells[..., 0] < len(SHAPES)).int().argmax(1)  # the first cell with an object
        first_shape, first_colour, _ = cells[torch.arange(len(cells)), first].unbind(-1)
        background = cells[torch.arange(len(cells)), (cells[..., 0] == len(SHAPES)).int().argmax(1), 1]
        kinds = (len(SHAPES), len(COLOURS), len(COLOURS), *MENTIONED_KINDS)
        labels = torch.stack([first_shape, first_colour, background, *mentioned.unbind(-1)], -1)
        summary = _cross_entropies(self.summary(pooled).split(kinds, -1), labels)
        return per_cell + 0.3 * (summary + mentioned_loss)


def parse_labels(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """What a CaptionParser should predict for these scenes: cells (B, 64, 3) and mentioned (B, 2)."""
    cells = torch.from_numpy(np.stack([cell_map(scene) for scene in scenes])).flatten(1, 2)
    return cells, torch.tensor([mentioned(scene) for scene in scenes])


def _cross_entropies(answers: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """The sum over questions; answers: one (..., kinds) per question, labels: (..., questions)."""
    pairs = zip(answers, labels.unbind(-1), strict=True)
    return torch.stack(
        [nn.functional.cross_entropy(logits.flatten(0, -2), right.flatten()) for logits, right in pairs]
    ).sum()


class PlainAttention:
    """FLUX's attention written out for training on a CPU.

    Two measured reasons (64 pictures, one core): torch's flash attention spends half of the step in its
    backward, and rotating even against odd channels without interleaving them back saves two copies; a dot
    product does not mind the order of channels.  Gives the same numbers as diffusers' FluxAttnProcessor.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,  # noqa: ARG002  diffusers passes it
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (HEADS, HEAD_SIZE)))
        key = attn.norm_k(attn.to_k(hidden_states).unflatten(-1, (HEADS, HEAD_SIZE)))
        value = attn.to_v(hidden_states).unflatten(-1, (HEADS, HEAD_SIZE))
        if encoder_hidden_states is not None:
            text = encoder_hidden_states
            text_query = attn.norm_added_q(attn.add_q_proj(text).unflatten(-1, (HEADS, HEAD_SIZE)))
            text_key = attn.norm_added_k(attn.add_k_proj(text).unflatten(-1, (HEADS, HEAD_SIZE)))
            text_value = attn.add_v_proj(text).unflatten(-1, (HEADS, HEAD_SIZE))
            query, key = torch.cat([text_query, query], 1), torch.cat([text_key, key], 1)
            value = torch.cat([text_value, value], 1)
        assert image_rotary_emb is not None
        query, key = _rotated(query, image_rotary_emb), _rotated(key, image_rotary_emb)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # (B, heads, tokens, 40)
        weights = torch.matmul(query * HEAD_SIZE**-0.5, key.transpose(-1, -2)).softmax(-1)
        mixed = torch.matmul(weights, value).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return mixed
        text_part, picture_part = mixed.split_with_sizes([text.shape[1], mixed.shape[1] - text.shape[1]], 1)
        return attn.to_out[0](picture_part.contiguous()), attn.to_add_out(text_part.contiguous())


def _rotated(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """x: (B, tokens, heads, 40); angles: cosine and sine, (1, tokens, 1, 20)."""
    (cosine, sine), (even, odd) = angles, (x[..., 0::2], x[..., 1::2])
    return torch.cat([even * cosine - odd * sine, odd * cosine + even * sine], -1)


class Gelu(nn.Module):
    """GELU in its tanh form, written with a sigmoid: the same numbers, for a CPU in half of the time."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * torch.sigmoid(1.5957691216 * x * (1 + 0.044715 * x * x))


class Flow:
    """The transformer's forward for training at 128 px: bf16 blocks (compiled if asked), time in fp32."""

    def __init__(self, transformer: Transformer, *, compiled: bool = False) -> None:
        self.transformer = transformer
        transformer.set_attn_processor(PlainAttention())
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        for block in transformer.single_transformer_blocks:
            block.act_mlp = Gelu()
        torch._dynamo.config.recompile_limit = 64  # noqa: SLF001  one graph per block and text length
        self.blocks = [torch.compile(block, dynamic=False) for block in blocks] if compiled else blocks
        self.angles: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(
        self, tokens: Tensor, pooled: Tensor, context: Tensor, time: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """The velocity noise - picture at time 0..1 of tokens (B, 64, 64); fp32."""
        net = self.transformer
        if guidance is None:
            modulation = net.time_text_embed(time * 1000, pooled)
        else:
            modulation = net.time_text_embed(time * 1000, guidance * 1000, pooled)
        with torch.autocast("cpu", torch.bfloat16):
            modulation = modulation.bfloat16()
            picture, text = net.x_embedder(tokens), net.context_embedder(context)
            angles = self._angles(context.shape[1])
            for block in self.blocks:
                text, picture = block(
                    hidden_states=picture,
                    encoder_hidden_states=text,
                    temb=modulation,
                    image_rotary_emb=angles,
                )
            velocity: Tensor = net.proj_out(net.norm_out(picture, modulation))
        return velocity.float()

    def _angles(self, text_tokens: int) -> tuple[Tensor, Tensor]:
        if text_tokens not in self.angles:
            ids = torch.zeros(text_tokens + CELLS * CELLS, 3)
            ids[text_tokens:, 1:] = torch.cartesian_prod(torch.arange(CELLS), torch.arange(CELLS))
            cosine, sine = (part[None, :, None, 0::2] for part in self.transformer.pos_embed(ids))
            self.angles[text_tokens] = (cosine.bfloat16().contiguous(), sine.bfloat16().contiguous())
        return self.angles[text_tokens]
