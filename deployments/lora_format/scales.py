"""The scale of a LoRA's layers, alpha / rank, from the tensors or the metadata of its file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from deployments.lora_format.classify import UNSUPPORTED
from deployments.lora_format.header import ADAPTER_METADATA, refusal


class LoraScales:
    """The scale of every layer of one file."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        """metadata: of the file. Raises BadRequest where peft's settings in it are no JSON table, or describe
        biases."""
        self._settings = _peft_settings(metadata)

    @property
    def largest_alpha(self) -> float | None:
        """Of those in the metadata, by magnitude; None where it has none."""
        alphas = [alpha for key in self._settings if (alpha := self._default(key)) is not None]
        patterns = [self._pattern(key) for key in self._settings]
        return max((*alphas, *(alpha for one in patterns for alpha in one.values())), key=abs, default=None)

    def of(self, part: str, path: str, rank: int, alpha: float | None) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA; 1 where the file has no alpha.

        part: "transformer", "text_encoder" ...; path: of the layer in it. alpha: of the layer's tensor; None:
        that of the metadata.
        """
        if alpha is not None:
            return alpha / rank
        default = self._default(f"{part}.lora_alpha")
        if default is None:
            return 1.0
        suffixes = (
            value
            for key, value in self._pattern(f"{part}.alpha_pattern").items()
            if f".{path}".endswith("." + key.removeprefix("^"))
        )
        value = next(suffixes, default)
        return value / (math.sqrt(rank) if self._settings.get(f"{part}.use_rslora") else rank)

    @property
    def rescaled(self) -> str | None:
        """The setting that says that the file is a DoRA; None where none does."""
        return next(
            (key for key, value in self._settings.items() if key.endswith(".use_dora") and value), None
        )

    def _default(self, key: str) -> float | None:
        """The alpha of a part's layers, where this is the setting that has it."""
        return _number(self._settings.get(key)) if key.endswith(".lora_alpha") else None

    def _pattern(self, key: str) -> Mapping[str, float]:
        """peft's alpha_pattern of a part: alphas by suffix of a path."""
        pattern = self._settings.get(key) if key.endswith(".alpha_pattern") else None
        if not isinstance(pattern, dict):
            return {}
        return {suffix: alpha for suffix, value in pattern.items() if (alpha := _number(value)) is not None}


def _number(value: object) -> float | None:
    """An alpha of the metadata; None where there is none. Raises BadRequest for what is no finite number."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise refusal(
            f"its metadata entry {ADAPTER_METADATA} has an alpha that is no number; correct or remove it"
        )
    return value


def _peft_settings(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """peft's settings by "part.name", as diffusers' save_lora_weights writes them; empty where there are
    none."""
    try:
        settings = json.loads(metadata.get(ADAPTER_METADATA) or "{}")
    except (ValueError, RecursionError):
        raise refusal(f"its metadata entry {ADAPTER_METADATA} is not JSON; correct or remove it") from None
    if not isinstance(settings, dict):
        raise refusal(f"its metadata entry {ADAPTER_METADATA} is no table; correct or remove it")
    for key, value in settings.items():
        if key.endswith(".lora_bias") and value:
            raise refusal(f"{UNSUPPORTED['bias']} ({key!r} in its metadata); train it without lora_bias")
    return settings
