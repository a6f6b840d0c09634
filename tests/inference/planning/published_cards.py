"""Cards of published models, for tables of plans: those that ship, and others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deployments.protocol.card import ModelCard, Weights, load_cards
from deployments.protocol.memory_needs import MemoryNeeds

CARDS: Mapping[str, ModelCard] = load_cards(Path(__file__).parents[3] / "configs/models")

# activations: reckoned on tensors without values at the size named
T5_XXL = {
    "parameters": 4762.3,
    "linear": 0.9723,
    "blocks": [{"count": 24, "parameters": 192.9}],
    "largest_layer": 131.6,
    "float32": 0.211,
}
UMT5_XXL = T5_XXL | {"parameters": 5680.9, "linear": 0.8151, "largest_layer": 1050.1, "float32": 0.177}
QWEN3_4B = {
    "parameters": 4022.5,
    "linear": 0.9033,
    "blocks": [{"count": 36, "parameters": 100.9}],
    "largest_layer": 389.0,
}
MEMORY: Mapping[str, dict[str, Any]] = {
    "flux.2-dev": {  # 1024 x 1024
        "parts": {
            "transformer": {
                "parameters": 32223.3,
                "linear": 1.0,
                "blocks": [{"count": 8, "parameters": 981.5}, {"count": 48, "parameters": 490.7}],
                "largest_layer": 339.7,
            },
            "text_encoder": {
                "parameters": 24011.4,
                "linear": 0.972,
                "blocks": [{"count": 40, "parameters": 556.3}],
                "largest_layer": 671.1,
            },
            "vae": {"parameters": 84.0},
        },
        "row_gib": 1.14,
        "encode_gib": 0.41,
        "decode_gib": 1.88,
        "lora_mib": 396,
    },
    "flux.2-klein-4b": {  # 1024 x 1024
        "parts": {
            "transformer": {
                "parameters": 3875.5,
                "linear": 1.0,
                "blocks": [{"count": 5, "parameters": 245.4}, {"count": 20, "parameters": 122.7}],
                "largest_layer": 84.9,
            },
            "text_encoder": QWEN3_4B,
            "vae": {"parameters": 84.0},
        },
        "row_gib": 0.58,
        "encode_gib": 0.31,
        "decode_gib": 1.88,
        "lora_mib": 97,
    },
    "qwen-image": {  # 1024 x 1024
        "parts": {
            "transformer": {
                "parameters": 20430.4,
                "linear": 0.9997,
                "blocks": [{"count": 60, "parameters": 339.8}],
                "largest_layer": 56.6,
            },
            "text_encoder": {
                "parameters": 8292.2,
                "linear": 0.934,
                "blocks": [{"count": 28, "parameters": 233.1}],
                "largest_layer": 545.0,
            },
            "vae": {"parameters": 126.9},
        },
        "row_gib": 0.38,
        "encode_gib": 0.28,
        "decode_gib": 3.4,
        "tiled_decode_gib": 0.3,
        "lora_mib": 564,
    },
    "z-image": {  # 1024 x 1024
        "parts": {
            "transformer": {
                "parameters": 6154.9,
                "linear": 0.9998,
                "blocks": [{"count": 34, "parameters": 180.7}],
                "largest_layer": 39.3,
            },
            "text_encoder": QWEN3_4B,
            "vae": {"parameters": 83.8},
        },
        "row_gib": 0.53,
        "encode_gib": 0.31,
        "decode_gib": 1.88,
        "lora_mib": 183,
    },
    "wan-2.1-14b": {  # 81 frames of 832 x 480
        "parts": {
            "transformer": {
                "parameters": 14288.8,
                "linear": 0.9996,
                "blocks": [{"count": 40, "parameters": 351.4}],
                "largest_layer": 157.3,
            },
            "text_encoder": UMT5_XXL,
            "vae": {"parameters": 126.9},
        },
        "row_gib": 3.5,
        "encode_gib": 0.1,
        "decode_gib": 4.0,
        "tiled_decode_gib": 0.9,
        "lora_mib": 297,
    },
    "wan-2.1-1.3b": {  # 81 frames of 832 x 480
        "parts": {
            "transformer": {
                "parameters": 1419.3,
                "linear": 0.9989,
                "blocks": [{"count": 30, "parameters": 46.4}],
                "largest_layer": 14.2,
            },
            "text_encoder": UMT5_XXL,
            "vae": {"parameters": 126.9},
        },
        "row_gib": 1.51,
        "encode_gib": 0.1,
        "decode_gib": 4.0,
        "tiled_decode_gib": 0.9,
        "lora_mib": 85,
    },
    "ltx-video": {  # 161 frames of 704 x 480
        "parts": {
            "transformer": {
                "parameters": 1923.4,
                "linear": 0.9993,
                "blocks": [{"count": 28, "parameters": 67.2}],
                "largest_layer": 25.2,
            },
            "text_encoder": T5_XXL,
            "vae": {"parameters": 419.2},
        },
        "row_gib": 0.43,
        "encode_gib": 0.1,
        "decode_gib": 5.1,
        "tiled_decode_gib": 3.7,
        "lora_mib": 93,
    },
}
VIDEOS = {  # width, height and frames by default, which MEMORY is reckoned for
    "wan-2.1-14b": (832, 480, 81),
    "wan-2.1-1.3b": (832, 480, 81),
    "ltx-video": (704, 480, 161),
}


def card_of(name: str) -> ModelCard:
    """The card that ships, or one with what a plan depends on."""
    if name in CARDS:
        return CARDS[name]
    base = CARDS["hunyuan-video" if name.startswith(("wan", "ltx")) else "flux.1-schnell"]
    memory = MemoryNeeds.model_validate(MEMORY[name])
    changes = {"id": name, "weights": Weights(repo=f"published/{name}"), "memory": memory, "controls": {}}
    if base.videos is not None:
        width, height, frames = VIDEOS[name]
        changes["sizes"] = base.sizes.model_copy(update={"width": width, "height": height})
        changes["videos"] = base.videos.model_copy(update={"num_frames": frames})
    return base.model_copy(update=changes)
