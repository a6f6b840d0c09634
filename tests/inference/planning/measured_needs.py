"""`memory` of a card, reckoned from published configurations on tensors without values.

    python -m tests.inference.planning.measured_needs qwen-image-edit

prints it as YAML: parameters are counted; activations are the most bytes that live at once in a forward of
the denoiser with one row, and in a decoding, at the card's default size. Attention counts as one kernel, as
on a GPU.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any
from unittest.mock import patch

import torch
import yaml
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from deployments.models.offload import blocks_of
from deployments.planning.part_plan import DENOISERS
from deployments.protocol.card import ModelCard
from tests.inference.planning.denoiser_inputs import INPUTS, latent_shape
from tests.inference.planning.published_cards import CARDS
from tests.inference.planning.published_models import MODELS, built

GIB, MIB = 2**30, 2**20
RANK = 32
# of a decoding, over its tensors: the simulated GPU counts 1.88 GiB where they are 1.5 (FLUX, SDXL)
WORKSPACE = 1.25


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors made inside it that live at once, without those of the module's weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        tensors = [*module.parameters(), *module.buffers()]
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, address, size)

    def _remove(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


@contextmanager
def _one_kernel_attention() -> Iterator[None]:
    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor:
        return torch.empty_like(query[..., : value.shape[-1]])

    with patch.object(nn.functional, "scaled_dot_product_attention", attention):
        yield


def peak_of(module: nn.Module, call: Callable[[], Any]) -> int:
    """Bytes of what a call of the module makes, at most at a time."""
    with torch.no_grad(), _one_kernel_attention(), LiveBytes(module) as seen:
        call()
    return seen.peak


def part_needs(name: str, module: nn.Module) -> dict[str, Any]:
    """`memory.parts` of this component."""
    counted = sum({id(t): t.numel() for t in [*module.parameters(), *module.buffers()]}.values())
    needs: dict[str, Any] = {"parameters": _millions(counted)}
    if name in ("vae", "image_encoder"):
        return needs
    embedded = {id(one.weight) for one in module.modules() if isinstance(one, nn.Embedding)}
    linears = [one.weight for one in module.modules() if isinstance(one, nn.Linear)]
    needs["linear"] = round(sum(w.numel() for w in linears if id(w) not in embedded) / counted, 4)
    sizes = [_millions(sum(t.numel() for t in one.parameters())) for one in blocks_of(module)]
    needs["blocks"] = [{"count": len(list(same)), "parameters": size} for size, same in groupby(sizes)]
    layers = [sum(p.numel() for p in m.parameters(recurse=False)) for m in module.modules()]
    needs["largest_layer"] = _millions(max(layers))
    if isinstance(module, PreTrainedModel) and (kept := _kept_in_float32(module)):
        needs["float32"] = round(kept / counted, 3)
    return needs


def _kept_in_float32(module: PreTrainedModel) -> int:
    names = getattr(module, "_keep_in_fp32_modules", None) or ()
    parameters = module.named_parameters()
    return sum(p.numel() for name, p in parameters if any(part in name.split(".") for part in names))


def _millions(count: float) -> float:
    return round(count / 1e6, 1 if count > 1e5 else 4)


def lora_mib(module: nn.Module) -> int:
    """Factors of a LoRA of rank 32 on all Linear layers in the blocks, in 16 bits."""
    sides = [sum(m.weight.shape) for b in blocks_of(module) for m in b.modules() if isinstance(m, nn.Linear)]
    return round(sum(sides) * RANK * 2 / MIB)


def memory_of(card: ModelCard) -> dict[str, Any]:
    """`memory` of this card. encode_gib is left to its author: text encoders are measured by none here."""
    modules = {name: built(*part) for name, part in MODELS[card.id].items() if name != "controlnet"}
    denoisers = [modules[name].to(torch.bfloat16) for name in DENOISERS if name in modules]
    inputs = INPUTS[type(denoisers[0]).__name__](card, denoisers[0])
    vae = modules["vae"].to(torch.bfloat16)
    latents = torch.empty(latent_shape(card, vae), device="meta", dtype=torch.bfloat16)
    found: dict[str, Any] = {
        "parts": {name: part_needs(name, module) for name, module in modules.items()},
        "row_gib": _gib(peak_of(denoisers[0], lambda: denoisers[0](**inputs))),
        "decode_gib": _gib(WORKSPACE * peak_of(vae, lambda: vae.decode(latents))),
    }
    if hasattr(vae, "enable_tiling"):
        vae.enable_tiling()
        tiled = _gib(WORKSPACE * peak_of(vae, lambda: vae.decode(latents)))
        if tiled < 0.9 * found["decode_gib"]:
            found["tiled_decode_gib"] = tiled
    return found | {"lora_mib": sum(map(lora_mib, denoisers))}


def _gib(count: float) -> float:
    return max(0.01, round(count / GIB, 2))


if __name__ == "__main__":
    for card_id in sys.argv[1:]:
        found = {card_id: memory_of(CARDS[card_id])}
        print(yaml.safe_dump(found, sort_keys=False, default_flow_style=None, width=200))
