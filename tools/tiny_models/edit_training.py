"""The tiny FLUX learns to edit as Kontext does: tokens of a reference drawing stand beside those of noise.

The transformer is the tiny FLUX's with one more double block in front.  Two heads of that block start as
"the reference's token at the same place", written to where the embedding of noise has nothing: training then
begins with the reference at hand instead of spending most of its steps on finding it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from random import Random

import numpy as np
import numpy.typing as npt
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from tools.tiny_models.autoencoder import linear_encode, pixels
from tools.tiny_models.edits import EditKind, draw_edit, instruction
from tools.tiny_models.flow import Progress, TrainingRun, noise_shares, save_when_due
from tools.tiny_models.learner import Learner, learning_rate
from tools.tiny_models.network import (
    CELLS,
    CONTEXT,
    HEAD_SIZE,
    HEADS,
    LATENT_CHANNELS,
    POOLED,
    ROPE_AXES,
    Autoencoder,
    Flow,
    TextEncoders,
    Transformer,
    pack,
)
from tools.tiny_models.scenes import render

TOKENS = 32  # of T5: instructions are shorter, and the card pads to as many
TOKEN_CHANNELS = 4 * LATENT_CHANNELS
COPYING_HEADS = 2  # they carry the 64 channels of a token
SHARPNESS = 2.0  # of these heads: the weights of their query and key norms
CHANGED_WEIGHT = 4.0  # tokens that the edit changes count four times
SHARES: dict[EditKind, float] = {  # of an edit in the batches, relative to one in the pool: hard kinds more
    "colour": 0.8,
    "background": 0.6,
    "move": 0.4,
    "size": 1.2,
    "shape": 1.8,
    "add": 1.2,
    "remove": 3.0,
}
DOUBLE_BLOCKS, SINGLE_BLOCKS = 3, 4


def build_edit_transformer(base: Transformer) -> Transformer:
    """The transformer of `base` (without guidance embedding) behind one more double block, which copies."""
    transformer: Transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=TOKEN_CHANNELS,
        num_layers=DOUBLE_BLOCKS,
        num_single_layers=SINGLE_BLOCKS,
        attention_head_dim=HEAD_SIZE,
        num_attention_heads=HEADS,
        joint_attention_dim=CONTEXT,
        pooled_projection_dim=POOLED,
        guidance_embeds=False,
        axes_dims_rope=ROPE_AXES,
    )
    state = {}
    for name, weight in base.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "transformer_blocks":
            index, _, rest = rest.partition(".")
            name = f"{part}.{int(index) + 1}.{rest}"
        state[name] = weight
    transformer.load_state_dict(state, strict=False)
    _start_copying(transformer)
    return transformer


@torch.no_grad()
def _start_copying(transformer: Transformer) -> None:
    """Make the first block fetch the reference's token at the same place; its other parts do nothing yet."""
    block = transformer.transformer_blocks[0]
    for norm in (block.norm1, block.norm1_context):
        nn.init.zeros_(norm.linear.weight)
        nn.init.zeros_(norm.linear.bias)
    width = HEADS * HEAD_SIZE
    block.norm1.linear.bias[2 * width : 3 * width] = 1.0  # the gate of attention
    attention = block.attn
    copying = slice(0, COPYING_HEADS * HEAD_SIZE)
    query, key = _same_place()
    for layer, vector in ((attention.to_q, query), (attention.to_k, key)):
        layer.weight[copying] = 0
        layer.bias[copying] = vector.repeat(COPYING_HEADS)
    nn.init.zeros_(attention.add_k_proj.weight)  # no text is near
    nn.init.zeros_(attention.add_k_proj.bias)
    attention.norm_q.weight.fill_(SHARPNESS)
    attention.norm_k.weight.fill_(SHARPNESS)
    embedding = transformer.x_embedder.weight.float()  # (160, 64)
    attention.to_v.weight[:TOKEN_CHANNELS] = torch.linalg.pinv(embedding)
    attention.to_v.bias.zero_()
    free = torch.linalg.svd(embedding).U[:, TOKEN_CHANNELS : 2 * TOKEN_CHANNELS]  # where the embedding is 0
    scale = embedding.norm() / TOKEN_CHANNELS**0.5
    attention.to_out[0].weight.mul_(0.1)
    attention.to_out[0].weight[:, copying] = 0
    attention.to_out[0].weight[:, :TOKEN_CHANNELS] = free * scale
    attention.to_out[0].bias.zero_()


def _same_place() -> tuple[Tensor, Tensor]:
    """A query and a key (40) whose product is largest one step away on the first axis, none on the others."""
    query, key = torch.zeros(HEAD_SIZE // 2, 2), torch.zeros(HEAD_SIZE // 2, 2)
    first_pair = 0
    for axis, size in enumerate(ROPE_AXES):
        pairs = size // 2
        frequencies = 10_000.0 ** (-torch.arange(pairs) * 2 / size)
        strength = torch.zeros(pairs)
        strength[: 1 if axis == 0 else 2] = 1.0  # the fastest: they tell neighbours apart
        phase = frequencies * (1.0 if axis == 0 else 0.0)
        part = slice(first_pair, first_pair + pairs)
        key[part, 0] = strength
        query[part] = torch.stack([phase.cos(), phase.sin()], -1) * strength[:, None]
        first_pair += pairs
    return query.flatten(), key.flatten()


class EditFlow(Flow):
    """The forward for training with one reference: its 64 tokens behind those of the noisy picture."""

    def velocity(
        self, noisy: Tensor, reference: Tensor, pooled: Tensor, context: Tensor, time: Tensor
    ) -> Tensor:
        """The velocity noise - picture, (B, 64, 64); all tokens (B, 64, 64)."""
        return self(torch.cat([noisy, reference], 1), pooled, context, time)[:, : noisy.shape[1]]

    def _angles(self, text_tokens: int) -> tuple[Tensor, Tensor]:
        if text_tokens not in self.angles:
            places = torch.cartesian_prod(torch.arange(CELLS), torch.arange(CELLS))
            ids = torch.zeros(text_tokens + 2 * len(places), 3)
            ids[text_tokens:, 1:] = torch.cat([places, places])
            ids[text_tokens + len(places) :, 0] = 1  # FluxKontextPipeline marks a reference so
            cosine, sine = (part[None, :, None, 0::2] for part in self.transformer.pos_embed(ids))
            self.angles[text_tokens] = (cosine.bfloat16().contiguous(), sine.bfloat16().contiguous())
        return self.angles[text_tokens]


@dataclass(frozen=True, slots=True)
class EditBatch:
    """Instructions, and packed latents (B, 64, 64) before and after."""

    texts: list[str]
    before: Tensor
    after: Tensor
    random: torch.Generator

    @property
    def token_weights(self) -> Tensor:
        """(B, 64, 1), mean 1 for each picture: more where the edit changes something."""
        changed = (self.after - self.before).abs().amax(-1, keepdim=True) > 0.1
        weights = torch.where(changed, CHANGED_WEIGHT, 1.0)
        return weights / weights.mean(1, keepdim=True)


def encode_edits(vae: Autoencoder, seeds: range) -> npt.NDArray[np.float16]:
    """Latents (N, 2, 16, 16, 16) of the drawings before and after the edits of these seeds."""
    latents = np.empty((len(seeds), 2, LATENT_CHANNELS, 16, 16), np.float16)
    for start in range(0, len(seeds), 250):
        edits = [draw_edit(seed) for seed in seeds[start : start + 250]]
        drawings = [np.asarray(render(scene)) for edit in edits for scene in (edit.before, edit.after)]
        encoded = linear_encode(vae, pixels(drawings)).numpy()
        latents[start : start + 250] = encoded.reshape(len(edits), 2, *encoded.shape[1:])
    return latents


def edit_batches(pool: npt.NDArray[np.float16], run: TrainingRun, start: int) -> Iterator[EditBatch]:
    """Batches from step `start` on; each step has its own seed, so a resumed run sees what an unbroken one
    would have seen."""
    reach = [*accumulate(SHARES[draw_edit(seed).kind] for seed in range(len(pool)))]
    for step in range(start, run.steps):
        random = Random(f"{run.seed}/{step}/{run.rank}")
        seeds = random.choices(range(len(pool)), cum_weights=reach, k=run.batch)
        texts = [instruction(draw_edit(seed), random) for seed in seeds]
        latents = torch.from_numpy(pool[seeds].astype(np.float32))
        generator = torch.Generator().manual_seed(random.getrandbits(60))
        yield EditBatch(texts, pack(latents[:, 0]), pack(latents[:, 1]), generator)


def train_edits(
    encoders: TextEncoders, flow: EditFlow, pool: npt.NDArray[np.float16], run: TrainingRun
) -> None:
    """Rectified flow from noise to the drawing after the edit, given the one before; encoders of text learn
    too."""
    modules: dict[str, nn.Module] = {
        "transformer": flow.transformer,
        "clip": encoders.clip,
        "t5": encoders.t5,
    }
    learner = Learner(modules, average_decay=0.99)
    learner.resume(run.folder / "edit.safetensors")
    progress = Progress("edit", learner, run)
    for batch in edit_batches(pool, run, learner.steps_done):
        time = noise_shares(len(batch.texts), batch.random)
        noise = torch.randn(batch.after.shape, generator=batch.random)
        with torch.autocast("cpu", torch.bfloat16):
            pooled, context = encoders.encode(batch.texts, TOKENS)
        mixed = torch.lerp(batch.after, noise, time[:, None, None])
        answer = flow.velocity(mixed, batch.before, pooled.float(), context.float(), time)
        error = answer - (noise - batch.after)
        loss = (error.square() * batch.token_weights).mean()
        progress.show(learner.learn(loss, 0.6 * learning_rate(learner.steps_done, run.steps)))
        save_when_due(learner, run, "edit")
