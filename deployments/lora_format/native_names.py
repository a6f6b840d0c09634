"""The names that models' first releases gave to the layers that diffusers names otherwise.

Trainers of FLUX, HunyuanVideo, Wan, Z-Image, Stable Diffusion and others write them. {n} is the number of a
block. A fused layer stands for several of diffusers', whose outputs follow each other in its rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

Names = dict[str, tuple[str, ...]]  # native name -> paths of diffusers' layers

_DOUBLE = "transformer_blocks.{n}"
_SINGLE = "single_transformer_blocks.{n}"
_IMAGE_QKV = tuple(f"{_DOUBLE}.attn.{name}" for name in ("to_q", "to_k", "to_v"))
_TEXT_QKV = tuple(f"{_DOUBLE}.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj"))
_SINGLE_QKV = tuple(f"{_SINGLE}.attn.{name}" for name in ("to_q", "to_k", "to_v"))
_FLUX: Names = {
    "double_blocks.{n}.img_attn.qkv": _IMAGE_QKV,
    "double_blocks.{n}.txt_attn.qkv": _TEXT_QKV,
    "double_blocks.{n}.img_attn.proj": (f"{_DOUBLE}.attn.to_out.0",),
    "double_blocks.{n}.txt_attn.proj": (f"{_DOUBLE}.attn.to_add_out",),
    "double_blocks.{n}.img_mlp.0": (f"{_DOUBLE}.ff.net.0.proj",),
    "double_blocks.{n}.img_mlp.2": (f"{_DOUBLE}.ff.net.2",),
    "double_blocks.{n}.txt_mlp.0": (f"{_DOUBLE}.ff_context.net.0.proj",),
    "double_blocks.{n}.txt_mlp.2": (f"{_DOUBLE}.ff_context.net.2",),
    "double_blocks.{n}.img_mod.lin": (f"{_DOUBLE}.norm1.linear",),
    "double_blocks.{n}.txt_mod.lin": (f"{_DOUBLE}.norm1_context.linear",),
    "single_blocks.{n}.linear1": (*_SINGLE_QKV, f"{_SINGLE}.proj_mlp"),
    "single_blocks.{n}.linear2": (f"{_SINGLE}.proj_out",),
    "single_blocks.{n}.modulation.lin": (f"{_SINGLE}.norm.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_XLABS: Names = {
    "double_blocks.{n}.processor.qkv_lora1": _IMAGE_QKV,
    "double_blocks.{n}.processor.qkv_lora2": _TEXT_QKV,
    "double_blocks.{n}.processor.proj_lora1": (f"{_DOUBLE}.attn.to_out.0",),
    "double_blocks.{n}.processor.proj_lora2": (f"{_DOUBLE}.attn.to_add_out",),
    "single_blocks.{n}.processor.qkv": _SINGLE_QKV,
    "single_blocks.{n}.processor.proj": (f"{_SINGLE}.proj_out",),
}
_REFINER = "context_embedder.token_refiner.refiner_blocks.{n}"
_HUNYUAN_VIDEO: Names = {  # as _FLUX where not named here
    "double_blocks.{n}.img_mlp.fc1": (f"{_DOUBLE}.ff.net.0.proj",),
    "double_blocks.{n}.img_mlp.fc2": (f"{_DOUBLE}.ff.net.2",),
    "double_blocks.{n}.txt_mlp.fc1": (f"{_DOUBLE}.ff_context.net.0.proj",),
    "double_blocks.{n}.txt_mlp.fc2": (f"{_DOUBLE}.ff_context.net.2",),
    "double_blocks.{n}.img_mod.linear": (f"{_DOUBLE}.norm1.linear",),
    "double_blocks.{n}.txt_mod.linear": (f"{_DOUBLE}.norm1_context.linear",),
    "single_blocks.{n}.modulation.linear": (f"{_SINGLE}.norm.linear",),
    "time_in.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.mlp.0": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.mlp.2": ("time_text_embed.guidance_embedder.linear_2",),
    "txt_in.input_embedder": ("context_embedder.proj_in",),
    "txt_in.t_embedder.mlp.0": ("context_embedder.time_text_embed.timestep_embedder.linear_1",),
    "txt_in.t_embedder.mlp.2": ("context_embedder.time_text_embed.timestep_embedder.linear_2",),
    "txt_in.c_embedder.linear_1": ("context_embedder.time_text_embed.text_embedder.linear_1",),
    "txt_in.c_embedder.linear_2": ("context_embedder.time_text_embed.text_embedder.linear_2",),
    "txt_in.individual_token_refiner.blocks.{n}.self_attn_qkv": tuple(
        f"{_REFINER}.attn.{name}" for name in ("to_q", "to_k", "to_v")
    ),
    "txt_in.individual_token_refiner.blocks.{n}.self_attn_proj": (f"{_REFINER}.attn.to_out.0",),
    "txt_in.individual_token_refiner.blocks.{n}.mlp.fc1": (f"{_REFINER}.ff.net.0.proj",),
    "txt_in.individual_token_refiner.blocks.{n}.mlp.fc2": (f"{_REFINER}.ff.net.2",),
    "txt_in.individual_token_refiner.blocks.{n}.adaLN_modulation.1": (f"{_REFINER}.norm_out.linear",),
}
_FLUX_2: Names = {  # as _FLUX where not named here
    "double_blocks.{n}.img_mlp.0": (f"{_DOUBLE}.ff.linear_in",),
    "double_blocks.{n}.img_mlp.2": (f"{_DOUBLE}.ff.linear_out",),
    "double_blocks.{n}.txt_mlp.0": (f"{_DOUBLE}.ff_context.linear_in",),
    "double_blocks.{n}.txt_mlp.2": (f"{_DOUBLE}.ff_context.linear_out",),
    "single_blocks.{n}.linear1": (f"{_SINGLE}.attn.to_qkv_mlp_proj",),
    "single_blocks.{n}.linear2": (f"{_SINGLE}.attn.to_out",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
}
_REFINED = ("layers.{n}", "noise_refiner.{n}", "context_refiner.{n}")  # the blocks of Z-Image and Lumina 2
_Z_IMAGE: Names = {
    "x_embedder": ("all_x_embedder.2-1",),
    "final_layer.linear": ("all_final_layer.2-1.linear",),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
}
_LUMINA_2: Names = {
    "cap_embedder.1": ("time_caption_embed.caption_embedder.1",),
    "t_embedder.mlp.0": ("time_caption_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_caption_embed.timestep_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear_1",),
    "final_layer.linear": ("norm_out.linear_2",),
}
for _block in _REFINED:
    _Z_IMAGE[f"{_block}.attention.qkv"] = tuple(f"{_block}.attention.to_{name}" for name in "qkv")
    _Z_IMAGE[f"{_block}.attention.out"] = (f"{_block}.attention.to_out.0",)
    _LUMINA_2[f"{_block}.attention.qkv"] = tuple(f"{_block}.attn.to_{name}" for name in "qkv")
    _LUMINA_2[f"{_block}.attention.out"] = (f"{_block}.attn.to_out.0",)
    _LUMINA_2[f"{_block}.adaLN_modulation.1"] = (f"{_block}.norm1.linear",)
    for _number in "123":
        _LUMINA_2[f"{_block}.feed_forward.w{_number}"] = (f"{_block}.feed_forward.linear_{_number}",)
_WAN: Names = {
    "blocks.{n}.self_attn.q": ("blocks.{n}.attn1.to_q",),
    "blocks.{n}.self_attn.k": ("blocks.{n}.attn1.to_k",),
    "blocks.{n}.self_attn.v": ("blocks.{n}.attn1.to_v",),
    "blocks.{n}.self_attn.o": ("blocks.{n}.attn1.to_out.0",),
    "blocks.{n}.cross_attn.q": ("blocks.{n}.attn2.to_q",),
    "blocks.{n}.cross_attn.k": ("blocks.{n}.attn2.to_k",),
    "blocks.{n}.cross_attn.v": ("blocks.{n}.attn2.to_v",),
    "blocks.{n}.cross_attn.o": ("blocks.{n}.attn2.to_out.0",),
    "blocks.{n}.cross_attn.k_img": ("blocks.{n}.attn2.add_k_proj",),
    "blocks.{n}.cross_attn.v_img": ("blocks.{n}.attn2.add_v_proj",),
    "blocks.{n}.ffn.0": ("blocks.{n}.ffn.net.0.proj",),
    "blocks.{n}.ffn.2": ("blocks.{n}.ffn.net.2",),
    "time_embedding.0": ("condition_embedder.time_embedder.linear_1",),
    "time_embedding.2": ("condition_embedder.time_embedder.linear_2",),
    "text_embedding.0": ("condition_embedder.text_embedder.linear_1",),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2",),
    "time_projection.1": ("condition_embedder.time_proj",),
    "img_emb.proj.1": ("condition_embedder.image_embedder.ff.net.0.proj",),
    "img_emb.proj.3": ("condition_embedder.image_embedder.ff.net.2",),
    "head.head": ("proj_out",),
}
_LTX: Names = {
    "patchify_proj": ("proj_in",),
    "adaln_single.linear": ("time_embed.linear",),
    "adaln_single.emb.timestep_embedder.linear_1": ("time_embed.emb.timestep_embedder.linear_1",),
    "adaln_single.emb.timestep_embedder.linear_2": ("time_embed.emb.timestep_embedder.linear_2",),
}
_UNET: Names = {  # Stable Diffusion's layers outside of its blocks
    "input_blocks.0.0": ("conv_in",),
    "out.2": ("conv_out",),
    "time_embed.0": ("time_embedding.linear_1",),
    "time_embed.2": ("time_embedding.linear_2",),
    "label_emb.0.0": ("add_embedding.linear_1",),
    "label_emb.0.2": ("add_embedding.linear_2",),
}
_RESNET = {  # of a resnet in Stable Diffusion's UNet
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_MODULE = re.compile(r"(?:(?:down|up)_blocks\.\d+|mid_block)\.\w+\.\d+")
_TABLES = (_FLUX, _XLABS, _FLUX_2, _HUNYUAN_VIDEO, _WAN, _LTX, _Z_IMAGE, _LUMINA_2, _UNET)

# of FLUX and those like it: the native layer gives shift and scale, diffusers' scale and shift
SWAPPED_HALVES = ("final_layer.adaLN_modulation.1", "norm_out.linear")


def native_names(paths: Iterable[str]) -> Names:
    """The native names of these layers of a denoiser. A name of which a layer is missing is left out."""
    known = set(paths)
    blocks = 1 + max((int(n) for path in known for n in re.findall(r"\.(\d+)\.", path)), default=-1)
    found = dict(_unet_blocks(known))
    for name, layers in ((name, layers) for table in _TABLES for name, layers in table.items()):
        for number in range(blocks) if "{n}" in name else (0,):
            numbered = tuple(layer.format(n=number) for layer in layers)
            if known.issuperset(numbered):
                found[name.format(n=number)] = numbered
    return found


def _unet_blocks(paths: set[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The layers of a UNet's blocks, which Stable Diffusion numbers from its input to its output."""
    modules = {path: match[0] for path in paths if (match := _UNET_MODULE.match(path)) is not None}
    native = dict(_unet_modules(set(modules.values())))
    for path, module in modules.items():
        if module in native:
            rest = path.removeprefix(f"{module}.")
            if ".resnets." in module:
                rest = _RESNET.get(rest, rest)
            yield f"{native[module]}.{'op' if '.downsamplers.' in module else rest}", (path,)


def _unet_modules(modules: set[str]) -> Iterator[tuple[str, str]]:
    """Paths of resnets, attentions and samplers, and their native names."""

    def count(kind: str) -> int:
        return sum(module.startswith(f"{kind}.") for module in modules)

    at = 1
    for block in range(_count_blocks(modules, "down_blocks")):
        name = f"down_blocks.{block}"
        for layer in range(count(f"{name}.resnets")):
            yield f"{name}.resnets.{layer}", f"input_blocks.{at}.0"
            yield f"{name}.attentions.{layer}", f"input_blocks.{at}.1"
            at += 1
        if count(f"{name}.downsamplers"):
            yield f"{name}.downsamplers.0", f"input_blocks.{at}.0"
            at += 1
    for number, module in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"mid_block.{module}", f"middle_block.{number}"
    at = 0
    for block in range(_count_blocks(modules, "up_blocks")):
        name = f"up_blocks.{block}"
        for layer in range(count(f"{name}.resnets")):
            yield f"{name}.resnets.{layer}", f"output_blocks.{at}.0"
            yield f"{name}.attentions.{layer}", f"output_blocks.{at}.1"
            at += 1
        yield f"{name}.upsamplers.0", f"output_blocks.{at - 1}.{2 if count(f'{name}.attentions') else 1}"


def _count_blocks(modules: Iterable[str], kind: str) -> int:
    """How many blocks of this kind there are."""
    numbers = (int(module.split(".")[1]) for module in modules if module.startswith(f"{kind}."))
    return 1 + max(numbers, default=-1)
