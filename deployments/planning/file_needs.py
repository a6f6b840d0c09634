"""What a model needs of a device's memory, from the headers of its files, where its card does not state it.

Weights are as exact as in a card. What forwards take is in no file: it is reckoned from the default size, by
what the largest known models take for a pixel, or for a token of a video.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from deployments.planning.local_files import pipeline_folder
from deployments.planning.part_plan import MILLION
from deployments.planning.video_needs import ForwardNeeds, video_activations
from deployments.protocol.card import ModelCard
from deployments.protocol.memory_needs import Blocks, MemoryNeeds, PartNeeds

ROW_GIB = 0.5  # of a forward, for each row and million pixels: FLUX.1-dev takes 0.43
DECODE_GIB = 1.9  # of an AutoencoderKL, for each million pixels
ENCODE_GIB = 0.1
LARGEST_HEADER = 100_000_000  # bytes, as safetensors allows
BLOCK = re.compile(r"^((?:[^.]+\.)*?[^.]+)\.(\d+)\.")  # the outermost list that a tensor is in, and its place
EMBEDDINGS = ("shared", "embed_tokens", "token_embedding", "position_embedding", "relative_attention_bias")

logger = logging.getLogger(__name__)

Shapes = Mapping[str, Sequence[int]]  # by name of the tensor


def with_needs(card: ModelCard) -> ModelCard:
    """The card with `memory` as the headers of its files say, if it states none and they are in a folder or
    in the hub's cache here; otherwise the card as it is. No tensor is read."""
    folder = pipeline_folder(card.weights)
    if card.memory is not None or folder is None:
        return card
    try:
        activations = _activations(card, folder)
        parts = {name: part for name in _part_names(folder) if (part := _needs_of(folder / name))}
    except (OSError, ValueError, LookupError, TypeError) as error:  # reported when it is loaded
        logger.info("headers of weights cannot be read", extra={"model": card.id, "error": repr(error)})
        return card
    if not parts or activations is None:
        return card
    needs = MemoryNeeds(
        parts=parts,
        row_gib=activations.row,
        encode_gib=ENCODE_GIB,
        decode_gib=activations.decode,
        from_files=True,
    )
    return card.model_copy(update={"memory": needs})


def _activations(card: ModelCard, folder: Path) -> ForwardNeeds | None:
    if card.videos is not None and not card.videos.framewise:
        return video_activations(card, folder)
    million = card.sizes.width * card.sizes.height / MILLION
    return ForwardNeeds(ROW_GIB * million, DECODE_GIB * million)


def _part_names(folder: Path) -> list[str]:
    index = json.loads((folder / "model_index.json").read_bytes())
    return [name for name, entry in index.items() if isinstance(entry, list) and (folder / name).is_dir()]


def _needs_of(folder: Path) -> PartNeeds | None:
    """Of the weights in this folder; None: there are none."""
    for index in folder.glob("*.safetensors.index.json"):
        if missing := {*json.loads(index.read_bytes())["weight_map"].values()} - {*os.listdir(folder)}:
            raise ValueError(f"{folder} lacks {sorted(missing)[0]}")
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if file.name.count(".") == 1] or files  # without those of a variant
    shapes = {name: shape for file in plain for name, shape in _shapes(file)}
    sizes = {name: math.prod(shape) / MILLION for name, shape in shapes.items()}
    total = sum(sizes.values())
    if not total:
        return None
    linear = sum(size for name, size in sizes.items() if _is_linear(name, shapes[name]))
    return PartNeeds(
        parameters=total,
        linear=min(1.0, linear / total),
        blocks=_blocks(sizes),
        largest_layer=max(sizes.values()),
    )


def _shapes(file: Path) -> Iterator[tuple[str, Sequence[int]]]:
    """Name and shape of each tensor in a safetensors file."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if not 2 <= size <= LARGEST_HEADER:
            raise ValueError(f"{file} is no safetensors file")
        header = json.loads(opened.read(size))
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, entry["shape"]


def _is_linear(name: str, shape: Sequence[int]) -> bool:
    path, _, kind = name.rpartition(".")
    return kind == "weight" and len(shape) == 2 and path.rpartition(".")[2] not in EMBEDDINGS


def _blocks(sizes: Mapping[str, float]) -> list[Blocks]:
    """The members of the outermost lists, list by list, equal ones together."""
    found: dict[tuple[str, int], float] = {}
    for name, size in sizes.items():
        if place := BLOCK.match(name):
            key = place[1], int(place[2])
            found[key] = found.get(key, 0.0) + size
    order = sorted(found, key=lambda key: (key[0].startswith("single"), key))  # FLUX's come last
    each = [round(found[key], 6) for key in order]
    return [Blocks(count=len([*same]), parameters=size) for size, same in groupby(each) if size > 0]
