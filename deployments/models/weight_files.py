"""The safetensors files of one module: which are read, and what their tensors take, before they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

# the names under which diffusers and transformers save the weights of a module
STEMS = ("diffusion_pytorch_model", "model")
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # in the header of a file
FLOATS = frozenset({"F64", *NAMES.values()})  # are cast to the dtype of the part
# layers of transformers' text encoders whose weights have the shape of a Linear's
EMBEDDINGS = ("shared", "embed_tokens", "token_embedding", "position_embedding", "relative_attention_bias")
BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16}


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files from which one module is read."""

    paths: tuple[Path, ...]
    variant: str | None  # the infix of their names, such as "fp16"

    def bytes_as(
        self, dtype: torch.dtype, in_float32: Collection[str] = (), linear_bits: float | None = None
    ) -> int:
        """Bytes of all tensors once those of floating point are cast to `dtype`; reads the headers only.

        in_float32: names of layers that are cast to float32 instead. linear_bits: of each weight of Linear
        layers, where those are quantised; by their names and shapes, and so about right.
        Raises SafetensorError for a file that is damaged or cut.
        """
        return sum(_bytes_in(path, dtype, frozenset(in_float32), linear_bits) for path in self.paths)

    @property
    def largest_linear(self) -> int:
        """Weights of its largest Linear layer, by names and shapes; reads the headers only."""
        sizes = (
            math.prod(shape)
            for path in self.paths
            for name, kind, shape in _tensors(path)
            if kind in FLOATS and _is_of_linear(name, shape)
        )
        return max(sizes, default=0)

    def are_in(self, dtype: torch.dtype) -> bool:
        """Whether all tensors of floating point have this dtype already."""
        return all(
            kind == NAMES[dtype] for path in self.paths for _, kind, _ in _tensors(path) if kind in FLOATS
        )


def find_weights(folder: Path, variant: str | None = None) -> WeightFiles:
    """The files that diffusers or transformers read for a module in this folder: of the variant if there are
    such, otherwise those without one.

    Raises FileNotFoundError naming the folder, or the shard that its index names and that is missing.
    """
    for infix in dict.fromkeys((variant, None)):
        for stem in STEMS:
            paths = _saved_as(folder, stem, infix)
            if paths:
                return WeightFiles(paths, infix)
    raise FileNotFoundError(
        f"there are no weights in {folder}: {STEMS[0]}.safetensors, {STEMS[1]}.safetensors"
    )


def _saved_as(folder: Path, stem: str, variant: str | None) -> tuple[Path, ...]:
    """The one file of this name, or the shards that its index names; empty where there is neither."""
    infix = "" if variant is None else f".{variant}"
    whole, index = folder / f"{stem}{infix}.safetensors", folder / f"{stem}.safetensors.index{infix}.json"
    if whole.is_file():
        return (whole,)
    if not index.is_file():
        return ()
    shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    for shard in shards:
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{index} names {shard}, which is missing")
    return tuple(folder / shard for shard in shards)


def _bytes_in(path: Path, dtype: torch.dtype, in_float32: frozenset[str], linear_bits: float | None) -> int:
    bits = 0.0
    for name, kind, shape in _tensors(path):
        width: float = BITS.get(kind, 8)
        if kind in FLOATS:
            width = 32 if in_float32.intersection(name.split(".")) else 8 * dtype.itemsize
            if linear_bits is not None and _is_of_linear(name, shape):
                width = min(width, linear_bits)
        bits += width * math.prod(shape)
    return int(bits) // 8


def _is_of_linear(name: str, shape: Sequence[int]) -> bool:
    path, _, kind = name.rpartition(".")
    return kind == "weight" and len(shape) == 2 and path.rpartition(".")[2] not in EMBEDDINGS


def _tensors(path: Path) -> Iterator[tuple[str, str, Sequence[int]]]:
    """Name, dtype and shape of each tensor, from the header of the file."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  it is no dict
            tensor = file.get_slice(name)
            yield name, str(tensor.get_dtype()), tensor.get_shape()
