"""Shipped tiny models as single files, under the names that Stable Diffusion's and FLUX's own code give."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
Tensors = dict[str, Tensor]
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
}
FLUX = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "proj_out": "final_layer.linear",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
FLUX_SINGLE = {
    "norm.linear": "modulation.lin",
    "proj_out": "linear2",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
}


def stable_diffusion(folder: Path) -> Tensors:
    """All weights of a Stable Diffusion or SDXL pipeline under the names of CompVis and Stability."""
    tensors = {f"model.diffusion_model.{name}": one for name, one in unet(folder / "unet").items()}
    tensors |= {f"first_stage_model.{name}": one for name, one in _vae(folder / "vae").items()}
    for name, one in weights_of(folder / "text_encoder").items():
        own = name if name.startswith("text_model.") else f"text_model.{name}"
        tensors[f"cond_stage_model.transformer.{own}"] = one
    return tensors


def flux_transformer(folder: Path) -> Tensors:
    """The weights of a FLUX transformer under the names of Black Forest Labs."""
    found, joined = Tensors(), dict[str, Tensors]()
    for name, one in weights_of(folder).items():
        block = re.match(r"(single_)?transformer_blocks\.(\d+)\.(.*)", name)
        if block is None:
            if name.startswith("norm_out.linear"):
                first, second = one.chunk(2)
                swapped = torch.cat([second, first])
                found[name.replace("norm_out.linear", "final_layer.adaLN_modulation.1")] = swapped
            else:
                found[_renamed(name, FLUX)] = one
            continue
        single, number, rest = block[1] is not None, block[2], block[3]
        place = f"{'single' if single else 'double'}_blocks.{number}"
        part, _, kind = rest.rpartition(".")
        together = _fused(part, single)
        if together is None:
            found[f"{place}.{_renamed(rest, FLUX_SINGLE if single else FLUX)}"] = one
        else:
            joined.setdefault(f"{place}.{together[0]}.{kind}", {})[together[1]] = one
    found |= {name: torch.cat([parts[key] for key in sorted(parts)]) for name, parts in joined.items()}
    return found


def _fused(part: str, single: bool) -> tuple[str, str] | None:
    """The layer that holds this one as a part, and the place in it."""
    order = {"attn.to_q": "0", "attn.to_k": "1", "attn.to_v": "2", "proj_mlp": "3"}
    if single:
        return ("linear1", order[part]) if part in order else None
    added = {"attn.add_q_proj": "0", "attn.add_k_proj": "1", "attn.add_v_proj": "2"}
    if part in added:
        return "txt_attn.qkv", added[part]
    return ("img_attn.qkv", order[part]) if part in order else None


def unet(folder: Path) -> Tensors:
    """The weights of a UNet of Stable Diffusion or SDXL under the names that they have alone in a file."""
    config = json.loads((folder / "config.json").read_text())
    per_block = config["layers_per_block"] + 1
    attends = [kind.startswith("CrossAttn") for kind in config["up_block_types"]]

    def place(name: str) -> str:
        if found := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
            block, member = int(found[2]), int(found[4])
            if found[1] == "down":
                if found[3] == "downsamplers":
                    return f"input_blocks.{per_block * (block + 1)}.0.op{found[5].removeprefix('conv')}"
                layer = f"input_blocks.{per_block * block + member + 1}"
            elif found[3] == "upsamplers":
                last = per_block * block + per_block - 1
                return f"output_blocks.{last}.{2 if attends[block] else 1}.{found[5]}"
            else:
                layer = f"output_blocks.{per_block * block + member}"
            return f"{layer}.{'0' if found[3] == 'resnets' else '1'}.{found[5]}"
        return _renamed(name, UNET)

    return {_resnet(place(name)): one for name, one in weights_of(folder).items()}


def _resnet(name: str) -> str:
    return ("transformer_blocks" in name and name) or _renamed(name, RESNET)


def _vae(folder: Path) -> Tensors:
    blocks = len(json.loads((folder / "config.json").read_text())["block_out_channels"])

    def place(name: str) -> str:
        name = _renamed(name, VAE)
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        for number in range(blocks):
            up = f"up.{blocks - 1 - number}"
            name = name.replace(f"up_blocks.{number}.resnets.", f"{up}.block.")
            name = name.replace(f"up_blocks.{number}.upsamplers.0", f"{up}.upsample")
        return name

    return {place(name): one for name, one in weights_of(folder).items()}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """The name with the longest of these parts replaced."""
    for own in sorted(names, key=len, reverse=True):
        if re.search(rf"(^|\.){re.escape(own)}(\.|$)", name):
            return re.sub(rf"(^|\.){re.escape(own)}(\.|$)", rf"\g<1>{names[own]}\g<2>", name)
    return name


def weights_of(folder: Path) -> Tensors:
    """All tensors of a module in the folder of diffusers or transformers."""
    return {
        name: one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()
    }


def write(path: Path, tensors: Tensors) -> Path:
    save_file({name: one.contiguous() for name, one in tensors.items()}, path, {"format": "pt"})
    return path
