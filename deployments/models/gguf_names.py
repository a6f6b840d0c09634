"""Names of tensors in GGUF files, and those that the modules of diffusers and transformers have for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import diffusers
from diffusers import ModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from gguf import MODEL_ARCH, get_tensor_name_map
from torch import Tensor, nn

PREFIX = "model.diffusion_model."  # in files that hold a whole checkpoint's denoiser
T5 = ("T5EncoderModel", "UMT5EncoderModel")
NOT_OF_AN_ENCODER = ("dec.", "output.")  # beginnings of names in a file of a whole T5
VIDEO_OF_WAN = (
    "WanTransformer3DModel",
    "WanVACETransformer3DModel",
    "WanAnimateTransformer3DModel",
    "SkyReelsV2Transformer3DModel",
    "ChronoEditTransformer3DModel",
)
# by what a file says in general.architecture, as ComfyUI-GGUF and llama.cpp write it
ARCHITECTURES: Mapping[str, tuple[str, ...]] = {
    "flux": ("FluxTransformer2DModel", "ChromaTransformer2DModel", "Flux2Transformer2DModel"),
    "sd3": ("SD3Transformer2DModel",),
    "sd1": ("UNet2DConditionModel",),
    "sdxl": ("UNet2DConditionModel",),
    "aura": ("AuraFlowTransformer2DModel",),
    "hidream": ("HiDreamImageTransformer2DModel",),
    "cosmos": ("CosmosTransformer3DModel",),
    "ltxv": ("LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel"),
    "hyvid": ("HunyuanVideoTransformer3DModel",),
    "wan": VIDEO_OF_WAN,
    "lumina2": ("Lumina2Transformer2DModel", "ZImageTransformer2DModel"),
    "qwen_image": ("QwenImageTransformer2DModel",),
    "t5": T5,
    "t5encoder": T5,
    "llama": (),
    "qwen2": (),
    "qwen2vl": (),
    "qwen3": (),
    "gemma2": (),
    "gemma3": (),
}


def is_readable(kind: Any) -> bool:
    """Whether modules of this class can have the weights of a GGUF file."""
    return issubclass(kind, ModelMixin) or kind.__name__ in T5


def fits(architecture: str | None, kind: Any) -> bool:
    """Whether a file of this architecture may be one for this class; one that is not known here may be."""
    known = None if architecture is None else ARCHITECTURES.get(architecture)
    return known is None or kind.__name__ in known


def named_as_in(module: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by the names that the module has for them; some are cut or joined on the way.

    Raises what diffusers raises for names that it does not expect.
    """
    own = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    expected = expected_names(module)
    if expected <= own.keys():
        return own
    if type(module).__name__ in T5:
        return _of_t5(module, expected, own)
    convert = _conversion(type(module))
    if convert is None:
        return own
    if isinstance(module, diffusers.UNet2DConditionModel):  # its conversion leaves out all other names
        own = {f"{PREFIX}{name}": tensor for name, tensor in own.items()}
    converted: dict[str, Tensor] = convert(checkpoint=own, config=dict(module.config))
    return converted


def expected_names(module: nn.Module) -> set[str]:
    """Of its parameters and buffers, without those that are tied to others."""
    tied: Collection[str] = getattr(module, "_tied_weights_keys", None) or ()
    return set(module.state_dict()) - set(tied)


def _of_t5(module: Any, expected: Collection[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Named as llama.cpp names the tensors of T5's encoder."""
    names = get_tensor_name_map(MODEL_ARCH.T5ENCODER, module.config.num_layers)
    own = {}
    for name in expected:
        path, _, kind = name.rpartition(".")
        own[f"{names.get_name(path)}.{kind}"] = name
    return {
        own.get(name, name): tensor
        for name, tensor in tensors.items()
        if not name.startswith(NOT_OF_AN_ENCODER)
    }


def _conversion(kind: Any) -> Callable[..., dict[str, Tensor]] | None:
    """How diffusers renames the tensors of the model's authors; None: it does not."""
    for name, functions in SINGLE_FILE_LOADABLE_CLASSES.items():
        if issubclass(kind, getattr(diffusers, name)):
            found: Callable[..., dict[str, Tensor]] = functions["checkpoint_mapping_fn"]  # type: ignore[index]
            return found
    return None
