"""Whether a LoRA's factors fit a model's layers, told by shapes alone. Loads no torch.

Keys are compared where they name a layer as diffusers, peft or kohya do; fused layers of other key styles are
left to whoever converts them (loras/source.py), who refuses what does not fit in any case.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

Shape = tuple[int, ...]

_SIDES = re.compile(
    r"(?P<layer>.+?)(?:\.lora_linear_layer\.|\.lora\.|_lora\.|\.lora_)"
    r"(?P<side>A|B|down|up)(?:\.default)?\.weight"
)
_PREFIXES = {  # of kohya's keys -> the part of the pipeline; "": the denoiser, whatever it is called
    "lora_unet_": "",
    "lora_transformer_": "",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
}
_PARTS = ("transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3")


def find_mismatch(factors: Mapping[str, Shape], layers: Mapping[str, Shape]) -> str | None:
    """The first factor that does not fit its layer, with both shapes; None where all that can be told fits.

    factors: by key of the file. layers: the weights of a model's Linear and Conv2d layers, (out, in) or
    (out, in, kh, kw), by part and path ("transformer.proj_out").
    """
    known = _by_name(layers)
    denoiser = "unet" if any(name.startswith("unet.") for name in layers) else "transformer"
    for key, shape in factors.items():
        match = _SIDES.fullmatch(key)
        weight = None if match is None else known.get(_name(match["layer"], denoiser))
        if match is None or weight is None:
            continue
        down = match["side"] in ("A", "down")
        fits = math.prod(shape[1:]) == math.prod(weight[1:]) if down else shape[:1] == weight[:1]
        if not fits:
            needed = ("rank", *weight[1:]) if down else (weight[0], "rank")
            return f"{key!r} is of shape {_text(shape)}, and its layer needs {_text(needed)}"
    return None


def _by_name(layers: Mapping[str, Shape]) -> dict[str, Shape | None]:
    """Layers by part and path without dots, as kohya writes it; None for two of one name."""
    named: dict[str, Shape | None] = {}
    for layer, shape in layers.items():
        name = _name(layer, "")
        named[name] = None if name in named else shape
    return named


def _name(layer: str, denoiser: str) -> str:
    """A layer's name in any style as part.path_with_underscores."""
    path = layer.removeprefix("base_model.model.").removeprefix("diffusion_model.")
    path = re.sub(r"\.processor\.to_out$", ".to_out.0", path).replace(".processor.", ".")
    first, dot, rest = path.partition(".")
    for prefix, part in _PREFIXES.items():
        if path.startswith(prefix):
            part, rest = part or denoiser, path.removeprefix(prefix)
            break
    else:
        part, rest = (first, rest) if first in _PARTS and dot else (denoiser, path)
    rest = rest.replace(".", "_")
    return f"{part}.{rest.removeprefix('text_model_') if part.startswith('text_encoder') else rest}"


def _text(shape: tuple[object, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
