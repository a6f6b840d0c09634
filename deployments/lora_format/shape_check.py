"""Whether the factors of a LoRA fit the layers of a model, by their shapes alone. Loads no torch.

Only keys that name a layer as diffusers, peft or kohya do are compared. Fused layers of other key styles are
checked on conversion (deployments/loras/source.py), which refuses every factor that does not fit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

Shape = tuple[int, ...]

PARTS = ("transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3")  # of a pipeline

_FACTOR_KEY = re.compile(
    r"(?P<layer>.+?)(?:\.lora_linear_layer\.|\.lora\.|_lora\.|\.lora_)"
    r"(?P<side>A|B|down|up)(?:\.default)?\.weight"
)
_PREFIXES = {  # kohya's prefix -> part of the pipeline; "": the denoiser, transformer or unet
    "lora_unet_": "",
    "lora_transformer_": "",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
}


def find_mismatch(factors: Mapping[str, Shape], layers: Mapping[str, Shape]) -> str | None:
    """A sentence about the first factor that does not fit its layer, with both shapes; None where none is
    found.

    factors: shapes by tensor name of the file, (rank, in, ...) for A or down and (out, rank, ...) for B or
    up. layers: weights of the model's Linear and Conv2d layers, (out, in) or (out, in, kh, kw), by part and
    path ("transformer.proj_out").
    """
    known = _by_layer_key(layers)
    denoiser = "unet" if any(name.startswith("unet.") for name in layers) else "transformer"
    for key, shape in factors.items():
        match = _FACTOR_KEY.fullmatch(key)
        weight = None if match is None else known.get(_layer_key(match["layer"], denoiser))
        if match is None or weight is None:
            continue
        down = match["side"] in ("A", "down")
        fits = math.prod(shape[1:]) == math.prod(weight[1:]) if down else shape[:1] == weight[:1]
        if not fits:
            needed = ("rank", *weight[1:]) if down else (weight[0], "rank")
            return f"{key!r} is of shape {_text(shape)}, and its layer needs {_text(needed)}"
    return None


def _by_layer_key(layers: Mapping[str, Shape]) -> dict[str, Shape | None]:
    """Shapes by layer key; None where two layers share one key."""
    named: dict[str, Shape | None] = {}
    for layer, shape in layers.items():
        key = _layer_key(layer, "")
        named[key] = None if key in named else shape
    return named


def _layer_key(layer: str, denoiser: str) -> str:
    """A layer's name in any style as part.path_with_underscores, which is how kohya writes paths."""
    path = layer.removeprefix("base_model.model.").removeprefix("diffusion_model.")
    path = re.sub(r"\.processor\.to_out$", ".to_out.0", path).replace(".processor.", ".")
    first, dot, rest = path.partition(".")
    for prefix, part in _PREFIXES.items():
        if path.startswith(prefix):
            part, rest = part or denoiser, path.removeprefix(prefix)
            break
    else:
        part, rest = (first, rest) if first in PARTS and dot else (denoiser, path)
    rest = rest.replace(".", "_")
    return f"{part}.{rest.removeprefix('text_model_') if part.startswith('text_encoder') else rest}"


def _text(shape: tuple[object, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
