"""The scale of a LoRA's layers, alpha / rank, from the tensors or the metadata of its file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from deployments.lora_format.classify import UNSUPPORTED
from deployments.lora_format.header import refusal
from deployments.loras.key_names import layer_path_of_alpha

METADATA_KEY = "lora_adapter_metadata"  # where diffusers' save_lora_weights writes peft's settings


class LoraScales:
    """The scale of every layer of one file."""

    def __init__(self, alphas: Mapping[str, float], settings: Mapping[str, Any]) -> None:
        """alphas: by key of diffusers' converters. settings: what `peft_settings` read from the metadata."""
        self._settings = settings
        self._alphas = {layer_path_of_alpha(key): alpha for key, alpha in alphas.items()}

    def of(self, part: str, path: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA; 1 where the file has no alpha.

        part: "transformer", "text_encoder" ...; path: of the layer in it. Raises BadRequest for an alpha that
        is no number.
        """
        if rank == 0:
            return 1.0
        alpha = self._alphas.get((part, path.removeprefix("text_model.")))
        if alpha is not None:
            return alpha / rank
        default = self._settings.get(f"{part}.lora_alpha")
        if self._alphas or default is None:
            return 1.0
        value = self._of_pattern(part, path, default)
        if not isinstance(value, int | float):
            raise refusal("its metadata has an alpha that is no number")
        return value / (math.sqrt(rank) if self._settings.get(f"{part}.use_rslora") else rank)

    def _of_pattern(self, part: str, path: str, default: object) -> object:
        """peft's alpha_pattern for this layer: the first suffix of its path that is listed."""
        pattern = self._settings.get(f"{part}.alpha_pattern")
        if not isinstance(pattern, dict):
            return default
        suffixes = (key for key in pattern if f".{path}".endswith("." + key.removeprefix("^")))
        return pattern.get(next(suffixes, ""), default)


def peft_settings(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """peft's settings by "part.name", as diffusers' save_lora_weights writes them; empty where there are
    none.

    Raises BadRequest where they are no JSON table, or describe a DoRA or biases.
    """
    try:
        settings = json.loads(metadata.get(METADATA_KEY) or "{}")
    except (ValueError, RecursionError):
        raise refusal(f"its metadata entry {METADATA_KEY} is not JSON") from None
    if not isinstance(settings, dict):
        raise refusal(f"its metadata entry {METADATA_KEY} is no table")
    for key, value in settings.items():
        if key.endswith(".use_dora") and value:
            raise refusal(UNSUPPORTED["dora"])
        if key.endswith(".lora_bias") and value:
            raise refusal("it changes biases too; train it without lora_bias")
    return settings
