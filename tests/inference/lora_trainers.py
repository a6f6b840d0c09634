"""LoRA files as trainers write them, made from known factors, and the table of them in docs/lora.md.

`python -m tests.inference.lora_trainers` writes the table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deployments.loras.source import layer_shapes
from tests.inference import families, tiny
from tests.inference.lora_files import Tensors

PAGE = Path(__file__).parents[2] / "docs/lora.md"
BEGIN, END = "<!-- formats: begin -->", "<!-- formats: end -->"
RANK, ALPHA = 4, 2.0

Shapes = Mapping[str, tuple[int, ...]]  # weights of layers by part and path
Naming = Callable[[str, str], str | None]  # part and path to a module's name; None: not trained
ORDER = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp")  # in fused layers


@dataclass(frozen=True, slots=True)
class Suffixes:
    """What a trainer puts behind a module's name."""

    down: str = ".lora_down.weight"
    up: str = ".lora_up.weight"
    alpha: str = ".alpha"  # empty: it writes none


KOHYA = Suffixes()
PEFT = Suffixes(".lora_A.weight", ".lora_B.weight", "")
PEFT_DEFAULT = Suffixes(".lora_A.default.weight", ".lora_B.default.weight", "")
PEFT_ALPHA = Suffixes(".lora_A.weight", ".lora_B.weight", ".alpha")
DIFFUSERS_OLD = Suffixes(".lora.down.weight", ".lora.up.weight", "")
DIFFUSERS_TEXT = Suffixes(".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", "")
PROCESSOR = Suffixes("_lora.down.weight", "_lora.up.weight", "")
XLABS = Suffixes(".down.weight", ".up.weight", "")


@dataclass(frozen=True, slots=True)
class Format:
    """How one trainer names the layers of one family."""

    trainer: str
    family: str
    name: Naming
    suffixes: Suffixes = KOHYA
    alpha_dtype: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32
    metadata: Mapping[str, str] | None = None
    scale: float | None = None  # alpha in the metadata; None: there is none

    @property
    def id(self) -> str:
        return f"{self.family}: {self.trainer}"


@dataclass(frozen=True, slots=True)
class File:
    """A file and what it has to change."""

    tensors: Tensors
    deltas: Mapping[tuple[str, str], Tensor]  # float64, by part and path
    metadata: dict[str, str] | None


def make_file(one: Format, shapes: Shapes, seed: int = 0) -> File:
    """Random factors for every layer that the trainer names, and alpha / rank * up @ down of each."""
    modules: dict[str, list[str]] = {}
    for layer in shapes:
        part, _, path = layer.partition(".")
        name = one.name(part, path)
        if name is not None:
            modules.setdefault(name, []).append(layer)
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    deltas: dict[tuple[str, str], Tensor] = {}
    for number, (module, unordered) in enumerate(modules.items()):
        layers = sorted(unordered, key=_place_in_fused) if len(unordered) > 1 else unordered
        weight = shapes[layers[0]]
        rows = [shapes[layer][0] for layer in layers]
        rank = RANK + number % 3
        alpha = ALPHA + number % 2
        down = torch.randn((rank, *weight[1:]), generator=generator).to(one.dtype)
        up = torch.randn((sum(rows), rank, *(1 for _ in weight[2:])), generator=generator).to(one.dtype)
        tensors[module + one.suffixes.down], tensors[module + one.suffixes.up] = down, up
        if one.suffixes.alpha:
            tensors[module + one.suffixes.alpha] = torch.tensor(alpha, dtype=one.alpha_dtype)
        scale = one.scale / rank if one.scale is not None else alpha / rank if one.suffixes.alpha else 1.0
        whole = scale * up.double().flatten(1) @ down.double().flatten(1)
        for layer, delta in zip(layers, whole.split(rows), strict=True):
            part, _, path = layer.partition(".")
            swapped = layer.endswith("norm_out.linear") and "adaLN" in module  # BFL's order is shift, scale
            deltas[part, path] = torch.cat(delta.chunk(2)[::-1]) if swapped else delta
    return File(tensors, deltas, None if one.metadata is None else dict(one.metadata))


# ---- the names of models' first releases, written down here independently of the code under test ----

FLUX_NATIVE = (
    (r"single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.lin"),
    (r"single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    (r"single_transformer_blocks\.(\d+)\.(attn\.to_[qkv]|proj_mlp)", r"single_blocks.\1.linear1"),
    (r"transformer_blocks\.(\d+)\.attn\.to_[qkv]", r"double_blocks.\1.img_attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj", r"double_blocks.\1.txt_attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"double_blocks.\1.img_mod.lin"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
    (r"x_embedder", "img_in"),
    (r"context_embedder", "txt_in"),
    (r"time_text_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"time_text_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
    (r"time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
    (r"time_text_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
    (r"time_text_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"proj_out", "final_layer.linear"),
)
XLABS_NATIVE = (
    (r"single_transformer_blocks\.(\d+)\.attn\.to_[qkv]", r"single_blocks.\1.processor.qkv_lora"),
    (r"single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.processor.proj_lora"),
    (r"transformer_blocks\.(\d+)\.attn\.to_[qkv]", r"double_blocks.\1.processor.qkv_lora1"),
    (r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj", r"double_blocks.\1.processor.qkv_lora2"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.processor.proj_lora1"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.processor.proj_lora2"),
)
HUNYUAN_NATIVE = (
    (r"single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.linear"),
    (r"single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    (r"single_transformer_blocks\.(\d+)\.(attn\.to_[qkv]|proj_mlp)", r"single_blocks.\1.linear1"),
    (r"transformer_blocks\.(\d+)\.attn\.to_[qkv]", r"double_blocks.\1.img_attn_qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj", r"double_blocks.\1.txt_attn_qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn_proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn_proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"double_blocks.\1.img_mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"double_blocks.\1.txt_mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"double_blocks.\1.img_mod.linear"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"double_blocks.\1.txt_mod.linear"),
    (
        r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.attn\.to_[qkv]",
        r"txt_in.individual_token_refiner.blocks.\1.self_attn_qkv",
    ),
    (
        r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.attn\.to_out\.0",
        r"txt_in.individual_token_refiner.blocks.\1.self_attn_proj",
    ),
    (
        r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.ff\.net\.0\.proj",
        r"txt_in.individual_token_refiner.blocks.\1.mlp.fc1",
    ),
    (
        r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.ff\.net\.2",
        r"txt_in.individual_token_refiner.blocks.\1.mlp.fc2",
    ),
    (r"context_embedder\.proj_in", "txt_in.input_embedder"),
    (r"proj_out", "final_layer.linear"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
)
FLUX_2_NATIVE = (
    (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
    (r"transformer_blocks\.(\d+)\.attn\.to_[qkv]", r"double_blocks.\1.img_attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj", r"double_blocks.\1.txt_attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.linear_in", r"double_blocks.\1.img_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff\.linear_out", r"double_blocks.\1.img_mlp.2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2"),
    (r"(\w+_stream_modulation\w*)\.linear", r"\1.lin"),
    (r"x_embedder", "img_in"),
    (r"context_embedder", "txt_in"),
    (r"time_guidance_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"time_guidance_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"proj_out", "final_layer.linear"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
)
Z_IMAGE_NATIVE = (
    (r"(.+)\.attention\.to_[qkv]", r"\1.attention.qkv"),
    (r"(.+)\.attention\.to_out\.0", r"\1.attention.out"),
    (r"all_(x_embedder|final_layer)\.2-1(.*)", r"\1\2"),
    (r"(.+)", r"\1"),
)
LUMINA_2_NATIVE = (
    (r"(.+)\.attn\.to_[qkv]", r"\1.attention.qkv"),
    (r"(.+)\.attn\.to_out\.0", r"\1.attention.out"),
    (r"(.+)\.feed_forward\.linear_([123])", r"\1.feed_forward.w\2"),
    (r"(.+)\.norm1\.linear", r"\1.adaLN_modulation.1"),
)
WAN_NATIVE = (
    (r"blocks\.(\d+)\.attn1\.to_([qkv])", r"blocks.\1.self_attn.\2"),
    (r"blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.self_attn.o"),
    (r"blocks\.(\d+)\.attn2\.to_([qkv])", r"blocks.\1.cross_attn.\2"),
    (r"blocks\.(\d+)\.attn2\.to_out\.0", r"blocks.\1.cross_attn.o"),
    (r"blocks\.(\d+)\.ffn\.net\.0\.proj", r"blocks.\1.ffn.0"),
    (r"blocks\.(\d+)\.ffn\.net\.2", r"blocks.\1.ffn.2"),
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"proj_out", "head.head"),
)
LTX_NATIVE = (
    (r"proj_in", "patchify_proj"),
    (r"time_embed\.(.+)", r"adaln_single.\1"),
    (r"(caption_projection\..+|transformer_blocks\..+|proj_out)", r"\1"),
)
# the tiny UNets have one resnet for each level on the way down and two on the way up
UNET_NATIVE = (
    (r"conv_in", "input_blocks.0.0"),
    (r"conv_out", "out.2"),
    (r"time_embedding\.linear_1", "time_embed.0"),
    (r"time_embedding\.linear_2", "time_embed.2"),
    (r"add_embedding\.linear_1", "label_emb.0.0"),
    (r"add_embedding\.linear_2", "label_emb.0.2"),
    (r"down_blocks\.0\.resnets\.0\.(.+)", r"input_blocks.1.0.\1"),
    (r"down_blocks\.0\.attentions\.0\.(.+)", r"input_blocks.1.1.\1"),
    (r"down_blocks\.0\.downsamplers\.0\.conv", r"input_blocks.2.0.op"),
    (r"down_blocks\.1\.resnets\.0\.(.+)", r"input_blocks.3.0.\1"),
    (r"down_blocks\.1\.attentions\.0\.(.+)", r"input_blocks.3.1.\1"),
    (r"mid_block\.resnets\.0\.(.+)", r"middle_block.0.\1"),
    (r"mid_block\.attentions\.0\.(.+)", r"middle_block.1.\1"),
    (r"mid_block\.resnets\.1\.(.+)", r"middle_block.2.\1"),
    (r"up_blocks\.0\.resnets\.0\.(.+)", r"output_blocks.0.0.\1"),
    (r"up_blocks\.0\.attentions\.0\.(.+)", r"output_blocks.0.1.\1"),
    (r"up_blocks\.0\.resnets\.1\.(.+)", r"output_blocks.1.0.\1"),
    (r"up_blocks\.0\.attentions\.1\.(.+)", r"output_blocks.1.1.\1"),
    (r"up_blocks\.0\.upsamplers\.0\.conv", r"output_blocks.1.2.conv"),
    (r"up_blocks\.1\.resnets\.0\.(.+)", r"output_blocks.2.0.\1"),
    (r"up_blocks\.1\.attentions\.0\.(.+)", r"output_blocks.2.1.\1"),
    (r"up_blocks\.1\.resnets\.1\.(.+)", r"output_blocks.3.0.\1"),
    (r"up_blocks\.1\.attentions\.1\.(.+)", r"output_blocks.3.1.\1"),
)
RESNET_NATIVE = (
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)


def _place_in_fused(layer: str) -> int:
    return ORDER.index(layer.rpartition(".")[2])


Renames = Sequence[tuple[str, str]]


def renamed(table: Renames, path: str) -> str | None:
    """The native name of a layer; None where the table has none."""
    for pattern, native in table:
        if re.fullmatch(pattern, path):
            return re.sub(pattern, native, path)
    return None


def unet_native(path: str) -> str | None:
    """The name of a UNet's layer in Stable Diffusion's own code."""
    for layer, native in RESNET_NATIVE:
        path = re.sub(rf"(resnets\.\d+)\.{layer}", rf"\1.{native}", path)
    return renamed(UNET_NATIVE, path)


def text_path(path: str) -> str:
    """A text encoder's path as trainers write it; transformers 5 has taken text_model out of some."""
    return f"text_model.{path}" if path.startswith(("encoder.layers.", "embeddings.")) else path


def underscored(path: str | None) -> str | None:
    return None if path is None else path.replace(".", "_")


def prefixed(prefix: str, path: str | None) -> str | None:
    return None if path is None else prefix + path


def in_denoiser(prefix: str, name: Callable[[str], str | None] = str) -> Naming:
    """The denoiser alone is trained."""
    return lambda part, path: None if part.startswith("text") else prefixed(prefix, name(path))


def with_text(denoiser: Naming, **prefixes: str) -> Naming:
    """Text encoders are trained too; prefixes: by part, ending in _ where dots become underscores."""

    def name(part: str, path: str) -> str | None:
        if not part.startswith("text"):
            return denoiser(part, path)
        prefix = prefixes.get(part)
        if prefix is None:
            return None
        return prefix + (text_path(path).replace(".", "_") if prefix.endswith("_") else text_path(path))

    return name


def kohya(table: Renames | None = None) -> Callable[[str], str | None]:
    """Underscores for dots, of native names or of diffusers' own."""
    return lambda path: underscored(path if table is None else renamed(table, path))


def native(table: Renames) -> Callable[[str], str | None]:
    return lambda path: renamed(table, path)


def kohya_unet(path: str) -> str | None:
    return underscored(unet_native(path))


def _linear_only(naming: Naming, *left_out: str) -> Naming:
    """As most trainers do by default: no convolutions and no embedders."""
    return lambda part, path: None if any(word in path for word in left_out) else naming(part, path)


def _old_processor(part: str, path: str) -> str | None:
    """diffusers before 0.20: attention processors, with to_out for to_out.0."""
    match = re.fullmatch(r"(.+\.attn[12])\.(to_[qkv]|to_out)(?:\.0)?", path)
    return None if match is None or part != "unet" else f"unet.{match[1]}.processor.{match[2]}"


CONVOLUTIONS = ("resnets", "conv", "samplers", "embedding", "text_projection")
TE, TE2, TE3 = "lora_te_", "lora_te2_", "lora_te3_"
PEFT_NOTE = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 8})}
F16, BF16, F8 = torch.float16, torch.bfloat16, torch.float8_e4m3fn

FORMATS = [
    Format(
        "kohya sd-scripts",
        "flux",
        with_text(in_denoiser("lora_unet_", kohya(FLUX_NATIVE)), text_encoder="lora_te1_"),
    ),
    Format(
        "kohya sd-scripts with T5",
        "flux",
        with_text(
            in_denoiser("lora_unet_", kohya(FLUX_NATIVE)), text_encoder="lora_te1_", text_encoder_2=TE3
        ),
        alpha_dtype=BF16,
        dtype=BF16,
    ),
    Format(
        "OneTrainer",
        "flux",
        with_text(in_denoiser("lora_transformer_", kohya()), text_encoder="lora_te1_", text_encoder_2=TE2),
    ),
    Format("peft", "flux", in_denoiser("base_model.model."), PEFT),
    Format("peft, name of the adapter in the keys", "flux", in_denoiser("base_model.model."), PEFT_DEFAULT),
    Format("diffusers", "flux", with_text(in_denoiser("transformer."), text_encoder="text_encoder."), PEFT),
    Format(
        "diffusers, alpha in the metadata",
        "flux",
        in_denoiser("transformer."),
        PEFT,
        metadata=PEFT_NOTE,
        scale=8.0,
    ),
    Format("DiffSynth-Studio", "flux", in_denoiser(""), PEFT_DEFAULT, dtype=BF16),
    Format("ai-toolkit", "flux", in_denoiser("transformer."), PEFT, dtype=BF16),
    Format("SimpleTuner", "flux", in_denoiser("transformer."), PEFT_ALPHA, alpha_dtype=torch.int64),
    Format(
        "ComfyUI",
        "flux",
        with_text(
            in_denoiser("diffusion_model.", native(FLUX_NATIVE)),
            text_encoder="text_encoders.clip_l.transformer.",
            text_encoder_2="text_encoders.t5xxl.transformer.",
        ),
        PEFT_ALPHA,
    ),
    Format("ComfyUI, 8 bits", "flux", in_denoiser("diffusion_model.", native(FLUX_NATIVE)), dtype=F8),
    Format("BFL", "flux", in_denoiser("", native(FLUX_NATIVE)), PEFT_ALPHA),
    Format("fal", "flux", in_denoiser("base_model.model.", native(FLUX_NATIVE)), PEFT),
    Format("XLabs", "flux", in_denoiser("", native(XLABS_NATIVE)), XLABS),
    Format("LyCORIS (algorithm LoRA)", "flux", in_denoiser("lycoris_", kohya())),
    Format(
        "kohya sd-scripts",
        "sdxl",
        _linear_only(
            with_text(in_denoiser("lora_unet_", kohya_unet), text_encoder="lora_te1_", text_encoder_2=TE2),
            *CONVOLUTIONS,
        ),
        dtype=F16,
        alpha_dtype=F16,
    ),
    Format(
        "kohya sd-scripts and LyCORIS, convolutions too",
        "sdxl",
        with_text(in_denoiser("lora_unet_", kohya_unet), text_encoder="lora_te1_", text_encoder_2=TE2),
    ),
    Format(
        "OneTrainer",
        "sdxl",
        with_text(in_denoiser("lora_unet_", kohya()), text_encoder="lora_te1_", text_encoder_2=TE2),
    ),
    Format(
        "diffusers",
        "sdxl",
        with_text(in_denoiser("unet."), text_encoder="text_encoder.", text_encoder_2="text_encoder_2."),
        PEFT,
    ),
    Format("diffusers before 0.26", "sdxl", in_denoiser("unet."), DIFFUSERS_OLD),
    Format("peft", "sdxl", in_denoiser("base_model.model."), PEFT),
    Format("ComfyUI", "sdxl", in_denoiser("diffusion_model.", unet_native)),
    Format(
        "kohya sd-scripts",
        "sd",
        _linear_only(with_text(in_denoiser("lora_unet_", kohya()), text_encoder=TE), *CONVOLUTIONS),
    ),
    Format(
        "LyCORIS (LoCon), convolutions too",
        "sd",
        with_text(in_denoiser("lora_unet_", kohya()), text_encoder=TE),
    ),
    Format("OneTrainer", "sd", with_text(in_denoiser("lora_unet_", kohya()), text_encoder=TE), dtype=BF16),
    Format("diffusers", "sd", with_text(in_denoiser("unet."), text_encoder="text_encoder."), PEFT),
    Format(
        "diffusers before 0.26",
        "sd",
        with_text(lambda *_: None, text_encoder="text_encoder."),
        DIFFUSERS_TEXT,
    ),
    Format("diffusers before 0.20", "sd", _old_processor, PROCESSOR),
    Format("peft", "sd", in_denoiser("base_model.model."), PEFT),
    Format("ComfyUI", "sd", in_denoiser("diffusion_model.", unet_native)),
    Format("musubi-tuner", "wan", in_denoiser("lora_unet_", kohya(WAN_NATIVE))),
    Format("Wan's own names", "wan", in_denoiser("", native(WAN_NATIVE)), PEFT_ALPHA),
    Format("ComfyUI", "wan", in_denoiser("diffusion_model.", native(WAN_NATIVE))),
    Format(
        "ai-toolkit, diffusion-pipe",
        "wan",
        in_denoiser("diffusion_model.", native(WAN_NATIVE)),
        PEFT,
        dtype=BF16,
    ),
    Format("DiffSynth-Studio", "wan", in_denoiser("", native(WAN_NATIVE)), PEFT_DEFAULT),
    Format("diffusers, SimpleTuner", "wan", in_denoiser("transformer."), PEFT),
    Format("peft", "wan", in_denoiser("base_model.model."), PEFT),
    Format("LTX-Video-Trainer, ComfyUI", "ltx", in_denoiser("diffusion_model."), PEFT),
    Format("LTX's own names", "ltx", in_denoiser("diffusion_model.", native(LTX_NATIVE)), PEFT_ALPHA),
    Format("kohya's names", "ltx", in_denoiser("lora_unet_", kohya())),
    Format("diffusers", "ltx", in_denoiser("transformer."), PEFT),
    Format("peft", "ltx", in_denoiser("base_model.model."), PEFT),
    Format("musubi-tuner", "hunyuan_video", in_denoiser("lora_unet_", kohya(HUNYUAN_NATIVE))),
    Format("ComfyUI", "hunyuan_video", in_denoiser("diffusion_model.", native(HUNYUAN_NATIVE)), PEFT_ALPHA),
    Format("diffusers", "hunyuan_video", in_denoiser("transformer."), PEFT),
    Format("kohya sd-scripts", "chroma", in_denoiser("lora_unet_", kohya(FLUX_NATIVE))),
    Format("ai-toolkit, ComfyUI", "flux2", in_denoiser("diffusion_model.", native(FLUX_2_NATIVE)), PEFT),
    Format("kohya sd-scripts, musubi-tuner", "flux2", in_denoiser("lora_unet_", kohya(FLUX_2_NATIVE))),
    Format("musubi-tuner", "qwen_image", in_denoiser("lora_unet_", kohya())),
    Format("ai-toolkit, ComfyUI", "qwen_image", in_denoiser("diffusion_model."), PEFT),
    Format("ai-toolkit, ComfyUI", "z_image", in_denoiser("diffusion_model."), PEFT),
    Format("Z-Image's own names", "z_image", in_denoiser("", native(Z_IMAGE_NATIVE)), PEFT_ALPHA),
    Format("musubi-tuner", "z_image", in_denoiser("lora_unet_", kohya())),
    Format("ComfyUI", "lumina2", in_denoiser("diffusion_model.", native(LUMINA_2_NATIVE)), PEFT_ALPHA),
]
CONTENTS: dict[str, Callable[[tuple[str, str]], bool]] = {
    "denoiser": lambda layer: not layer[0].startswith("text"),
    "convolutions": lambda layer: "conv" in layer[1],
    "CLIP": lambda layer: layer[0].startswith("text") and ".layers." in layer[1],
    "T5": lambda layer: "SelfAttention" in layer[1],
}
PIPELINES: dict[str, Callable[[], Any]] = {
    "flux": tiny.flux,
    "sdxl": tiny.sdxl,
    "sd": tiny.sd,
    "wan": families.wan,
    "ltx": families.ltx,
    "hunyuan_video": families.hunyuan_video,
    "chroma": families.chroma,
    "flux2": families.flux2_klein,
    "qwen_image": families.qwen_image,
    "z_image": families.z_image,
    "lumina2": families.lumina2,
}
FAMILIES = {
    "flux": "FLUX", "sdxl": "SDXL", "sd": "Stable Diffusion 1.5", "wan": "Wan", "ltx": "LTX",
    "hunyuan_video": "HunyuanVideo", "chroma": "Chroma", "flux2": "FLUX.2", "qwen_image": "Qwen-Image",
    "z_image": "Z-Image", "lumina2": "Lumina 2",
}  # fmt: skip


def table(files: Mapping[str, File]) -> str:
    """The part of docs/lora.md between the marks. files: one in each format, by `Format.id`."""
    lines = ["| family | trainer | changes | a key |", "| --- | --- | --- | --- |"]
    for one in FORMATS:
        file = files[one.id]
        changed = [what for what, is_in in CONTENTS.items() if any(map(is_in, file.deltas))]
        key = min(file.tensors, key=lambda key: ("attn" not in key, key.endswith("alpha"), len(key)))
        lines.append(f"| {FAMILIES[one.family]} | {one.trainer} | {', '.join(changed)} | `{key}` |")
    return "\n".join(lines)


def make_files(shapes: Mapping[str, Shapes]) -> dict[str, File]:
    """A file in each format, by `Format.id`. shapes: of the layers of a model, by family."""
    return {one.id: make_file(one, shapes[one.family]) for one in FORMATS}


def main() -> None:
    shapes = {family: layer_shapes(make()) for family, make in PIPELINES.items()}
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(make_files(shapes))}\n{END}{after}")


if __name__ == "__main__":
    main()
