"""LoRA files of the published kind for a model without weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import save

DENOISERS = ("transformer.", "unet.")


def lora_file(shapes: Mapping[str, tuple[int, ...]], rank: int, seed: int) -> bytes:
    """A LoRA over all linear layers of the denoiser's blocks, in diffusers' names.

    shapes: of the model's layers, by component and path. seed: makes files differ.
    """
    tensors = {}
    for layer, shape in shapes.items():
        if layer.startswith(DENOISERS) and "block" in layer and len(shape) == 2:
            rows, columns = shape
            tensors[f"{layer}.lora_A.weight"] = torch.full((rank, columns), 1e-3 * seed, dtype=torch.bfloat16)
            tensors[f"{layer}.lora_B.weight"] = torch.full((rows, rank), 1e-3, dtype=torch.bfloat16)
    return save(tensors)
