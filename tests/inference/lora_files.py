"""LoRA files with random factors for a pipeline's layers, and what diffusers itself makes of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def random_lora(
    pipeline: Any,
    parts: Iterable[str],
    *,
    rank: int = 4,
    seed: int = 0,
    only: Callable[[str, nn.Module], bool] = lambda _path, _layer: True,
    size: float = 1.0,
) -> Tensors:
    """In diffusers' names, for every Linear and Conv2d of `parts` that `only` lets through."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for part in parts:
        for path, layer in getattr(pipeline, part).named_modules():
            if not isinstance(layer, nn.Linear | nn.Conv2d) or not only(path, layer):
                continue
            weight = layer.weight
            a_shape = (rank, *weight.shape[1:])
            b_shape = (weight.shape[0], rank, *(1 for _ in weight.shape[2:]))
            scale = size * float(weight.detach().float().std()) / rank**0.5
            tensors[f"{part}.{path}.lora_A.weight"] = torch.randn(a_shape, generator=generator)
            tensors[f"{part}.{path}.lora_B.weight"] = scale * torch.randn(b_shape, generator=generator)
    return tensors


def file_of(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    return save({key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}, metadata)


def forged(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def with_diffusers(pipeline: Any, files: Sequence[tuple[bytes, float]], folder: Path) -> Any:
    """A copy of the pipeline with these files loaded and activated by diffusers' own functions."""
    loaded = copy.deepcopy(pipeline)
    names = []
    for index, (file, _) in enumerate(files):
        path = folder / f"lora_{index}.safetensors"
        path.write_bytes(file)
        loaded.load_lora_weights(path, adapter_name=f"a{index}")
        names.append(f"a{index}")
    if names:
        loaded.set_adapters(names, [weight for _, weight in files])
    return loaded
