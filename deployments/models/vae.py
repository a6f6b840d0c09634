"""A model's VAE, shared by requests in turns: its own dtype beside a pipeline's, and its tiles."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from deployments.models.offload import share_place
from deployments.planning.plan import Plan
from deployments.protocol.errors import ModelFailed

TILE_PIXELS = 512  # side of a tile at most: many VAEs would only take pictures beyond 1024 pixels apart


def check_pieces(vae: Any, *, tiling: bool, slicing: bool) -> None:
    """Raises ModelFailed for a VAE that cannot do what `set_pieces` wants. vae: also without weights."""
    for wanted, piece in ((tiling, "tiling"), (slicing, "slicing")):
        if wanted and not _has_pieces(vae, piece):
            raise ModelFailed(f"{type(vae).__name__} cannot do vae_{piece}; take it out of the card")


def _has_pieces(vae: Any, piece: str) -> bool:
    return hasattr(vae, f"enable_{piece}") and hasattr(vae, f"use_{piece}")


def set_pieces(vae: Any, *, tiling: bool, slicing: bool) -> None:
    """Have the VAE decode and encode in tiles, and one picture of a batch at a time, which takes less memory.

    Raises ModelFailed for a VAE that cannot.
    """
    check_pieces(vae, tiling=tiling, slicing=slicing)
    if tiling:
        vae.enable_tiling()
    if slicing:
        vae.enable_slicing()
    if tiling and hasattr(vae, "tile_latent_min_size"):
        _set_tile(vae)


def tiled_beside(pipeline: Any, plan: Plan) -> nn.Module | None:
    """The pipeline's VAE as it decodes in tiles, which shares its weights; None where the plan tiles all
    pictures or none, and where the VAE has no tiles. A VAE keeps its switch on itself, and other requests use
    it meanwhile."""
    if plan.whole_pixels is None or plan.vae_tiling or not _has_pieces(pipeline.vae, "tiling"):
        return None
    vae = copy.copy(pipeline.vae)
    set_pieces(vae, tiling=True, slicing=plan.vae_slicing)
    share_place(pipeline.vae, vae)
    return vae  # type: ignore[no-any-return]


def _set_tile(vae: Any) -> None:
    """Of VAEs with square tiles, of which diffusers overlaps a quarter: a multiple of 4 latents on each side,
    or the picture would have another size."""
    pixels_per_latent = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = min(vae.tile_latent_min_size, TILE_PIXELS // pixels_per_latent)
    vae.tile_latent_min_size = max(4, latents // 4 * 4)
    vae.tile_sample_min_size = vae.tile_latent_min_size * pixels_per_latent


def prepare_vae(vae: Any, dtype: torch.dtype) -> None:
    """Have pipelines whose latents are of `dtype` use this VAE as it is.

    In float16 most VAEs overflow, so theirs is in float32: inputs are cast to its dtype, latents to `dtype`.
    """
    if "force_upcast" in vae.config:
        # pipelines would cast the shared VAE to float32 and back while other requests use it. The option
        # exists for the range of float16; bfloat16 has the range of float32
        vae.register_to_config(force_upcast=False)
    if vae.dtype is dtype:
        return
    vars(vae)["to"] = lambda *_args, **_kwargs: vae  # some pipelines cast it on Apple's GPUs
    for part in vae.children():
        if any(parameter.is_floating_point() for parameter in part.parameters()):
            part.register_forward_pre_hook(_casting_inputs(vae.dtype), with_kwargs=True)
    _last_of_encoding(vae).register_forward_hook(lambda _module, _inputs, output: _cast(output, dtype))


def _last_of_encoding(vae: Any) -> nn.Module:
    """The part of the VAE that gives the latents of a picture."""
    last = getattr(vae, "quant_conv", None)
    encoder: nn.Module = vae.encoder
    return last if isinstance(last, nn.Module) else encoder


def _casting_inputs(dtype: torch.dtype) -> Any:
    """A hook for the inputs of a module. Lists stay the same objects: Wan's VAE writes to one."""

    def cast_inputs(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cast = {name: _cast(value, dtype) if _is_float(value) else value for name, value in kwargs.items()}
        return tuple(_cast(value, dtype) if _is_float(value) else value for value in args), cast

    return cast_inputs


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _cast(output: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if _is_float(tensor) else tensor, output)
