"""Safetensors files for tests: as small as a LoRA can be."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

NIGHT = (
    Path(__file__).parents[3] / "models/tiny-flux-schnell/loras/lora_night/pytorch_lora_weights.safetensors"
)


def lora_file(seed: int = 0, layer: str = "unet.down_blocks.0.attn.to_q", **metadata: str) -> bytes:
    """A rank 2 LoRA of one layer; every seed has another digest. Its family is Stable Diffusion's."""
    tensors = {f"{layer}.lora_A.weight": (2, 4), f"{layer}.lora_B.weight": (4, 2)}
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for key, shape in tensors.items():
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + 32]}
        at += 32
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes([seed % 251]) * at


def digest(file: bytes) -> str:
    return hashlib.sha256(file).hexdigest()
