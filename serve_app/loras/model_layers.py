"""The layers of a model by the headers of its weights, where they lie in a local folder: no replica is asked.

Reads no tensor and loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from deployments.lora_format.layer_names import PARTS, Shape
from deployments.protocol.card import Weights
from serve_app.settings import ROOT

MAX_HEADER_BYTES = 100 * 2**20  # safetensors' own limit
EMBEDDINGS = ("shared", "embed_tokens", "token_embedding", "position_embedding", "relative_attention_bias")


def stored_layer_shapes(weights: Weights) -> Mapping[str, Shape] | None:
    """Weight shapes of the Linear and Conv2d layers by part and path ("transformer.proj_out"), as the file
    names them; None where the weights are not in a folder of this machine."""
    if weights.is_remote or weights.path is None:
        return None
    folder = ROOT / Path(weights.path).expanduser()
    try:
        return dict(_layers(folder, weights.variant)) or None
    except (OSError, ValueError, KeyError, TypeError):  # missing, or another format: the replica knows
        return None


def _layers(folder: Path, variant: str | None) -> Iterator[tuple[str, Shape]]:
    """Raises ValueError where the files do not say all."""
    for part in PARTS:
        if not (folder / part).is_dir():
            continue
        if "quantization_config" in json.loads((folder / part / "config.json").read_bytes()):
            raise ValueError(f"{part} is quantised: its files hold other shapes than its layers have")
        files = [file for file in (folder / part).glob("*.safetensors") if _variant(file) == variant]
        if not files:
            raise ValueError(f"{part} has no safetensors files")
        for file in files:
            for name, entry in _header(file).items():
                path, _, kind = name.rpartition(".")
                is_layer = kind == "weight" and path.rpartition(".")[2] not in EMBEDDINGS
                if is_layer and len(entry["shape"]) in (2, 4):
                    yield f"{part}.{path}", tuple(entry["shape"])


def _variant(file: Path) -> str | None:
    """fp16 of model.fp16.safetensors and model.fp16-00001-of-00002.safetensors; None where there is none."""
    infix = file.name.removesuffix(".safetensors").partition(".")[2]
    return infix.partition("-")[0] or None


def _header(file: Path) -> Mapping[str, Mapping[str, list[int]]]:
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"{file.name} is no safetensors file")
        header: dict[str, dict[str, list[int]]] = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return header
