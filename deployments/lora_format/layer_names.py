"""Which layers of a model a module of a LoRA file is, in the names of any trainer.

Names are compared with underscores for dots, which is how kohya writes paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from deployments.lora_format.native_names import SWAPPED_HALVES, native_names

Shape = tuple[int, ...]
LayerKey = tuple[str, str]  # part of the pipeline ("transformer"), path of the layer in it

PARTS = ("transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3")  # of a pipeline

_DENOISER = ""
_T5 = ("text_encoder_3", "text_encoder_2", "text_encoder")  # of the three, the one that has the layer
_PREFIXES: tuple[tuple[str, Sequence[str]], ...] = (  # in front of a module's name, the longest first
    ("lora_unet_", (_DENOISER,)),
    ("lora_transformer_", (_DENOISER,)),
    ("lora_te1_", ("text_encoder",)),
    ("lora_te2_", ("text_encoder_2",)),
    ("lora_te3_", _T5),
    ("lora_te_", ("text_encoder",)),
    ("text_encoders.clip_l.transformer.", ("text_encoder",)),
    ("text_encoders.clip_g.transformer.", ("text_encoder_2",)),
    ("text_encoders.t5xxl.transformer.", _T5),
    ("text_encoders.umt5xxl.transformer.", _T5),
    ("text_encoder_3.", ("text_encoder_3",)),
    ("text_encoder_2.", ("text_encoder_2",)),
    ("text_encoder.", ("text_encoder",)),
    ("transformer.", (_DENOISER,)),
    ("unet.", (_DENOISER,)),
    ("lora_", (_DENOISER,)),
    ("", (_DENOISER,)),
)
_WRAPPERS = (
    "module.", "_orig_mod.", "pipe.dit.", "base_model.model.", "model.diffusion_model.", "diffusion_model.",
    "lycoris_",
)  # fmt: skip
_OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True, slots=True)
class Target:
    """A layer that a module of a file changes."""

    layer: LayerKey
    weight: Shape  # (out, in) or (out, in, kh, kw)
    rows: tuple[int, int]  # of the module's outputs, from and to: those that are this layer's
    swapped: bool = False  # the first half of its outputs is the layer's second half


class LayerNames:
    """The layers of a model by every name that a LoRA file may give to them."""

    def __init__(self, layers: Mapping[str, Shape]) -> None:
        """layers: weights of the Linear and Conv2d layers by part and path ("transformer.proj_out")."""
        self._denoiser = "unet" if any(name.startswith("unet.") for name in layers) else "transformer"
        self._targets: dict[tuple[str, str], tuple[Target, ...] | None] = {}  # None: the name is ambiguous
        for name, shape in layers.items():
            part, _, path = name.partition(".")
            self._add(part, path, (Target((part, path), shape, (0, shape[0])),))
        own = {name.partition(".")[2]: shape for name, shape in layers.items() if self._is_of_denoiser(name)}
        for native, paths in native_names(own).items():
            self._add(self._denoiser, native, tuple(self._stacked(native, paths, own)))

    def find(self, module: str) -> tuple[Target, ...] | None:
        """The layers that the module stands for, in the order of its outputs; None where there is none."""
        module = _unwrapped(module)
        for prefix, parts in _PREFIXES:
            for part in parts if module.startswith(prefix) else ():
                for name in _spellings(module.removeprefix(prefix), part):
                    found = self._targets.get((part or self._denoiser, name))
                    if found is not None:
                        return found
        return None

    def _is_of_denoiser(self, name: str) -> bool:
        return name.startswith(f"{self._denoiser}.")

    def _stacked(self, native: str, paths: Sequence[str], layers: Mapping[str, Shape]) -> Iterator[Target]:
        at = 0
        for path in paths:
            shape = layers[path]
            end = at + shape[0]
            yield Target((self._denoiser, path), shape, (at, end), (native, path) == SWAPPED_HALVES)
            at = end

    def _add(self, part: str, path: str, targets: tuple[Target, ...]) -> None:
        key = part, _spelled(path, part)
        known = self._targets.get(key, targets)
        same = known is not None and [one.layer for one in known] == [one.layer for one in targets]
        self._targets[key] = targets if same else None


def _unwrapped(module: str) -> str:
    """The name without what peft, torch, DiffSynth, ComfyUI and LyCORIS put in front of all names."""
    for wrapper in _WRAPPERS:
        module = module.removeprefix(wrapper)
    for part in PARTS:  # peft's wrapper may stand behind the part too
        module = module.replace(f"{part}.base_model.model.", f"{part}.", 1)
    return module


def _spelled(path: str, part: str) -> str:
    """The path as it is compared. Versions of transformers differ in text_model."""
    name = path.replace(".", "_")
    return name.removeprefix("text_model_") if part.startswith("text_encoder") else name


def _spellings(path: str, part: str) -> Iterator[str]:
    """The path, and what it may be called today where an old version of diffusers wrote it."""
    name = _spelled(path, part)
    yield name
    if part.startswith("text_encoder"):
        old = re.fullmatch(r"(.+_self_attn_)(to_q|to_k|to_v|to_out)", name)
        if old is not None:
            yield old[1] + _OLD_TEXT_NAMES[old[2]]
        return
    name = name.replace("_processor_to_", "_to_")
    yield name
    if name.endswith("_to_out"):
        yield f"{name}_0"
