"""The LoRAs that a request asks for, before any of them is looked up (pure)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from deployments.protocol.errors import BadRequest
from deployments.protocol.request import MAX_LORA_WEIGHT
from serve_app.storage.spooled_file import SpooledFile

TAG = re.compile(r"<lora:([^<>]*)>", re.IGNORECASE)
# only from the first of several blanks: from each of them the time would grow with the square of their number
BLANKS_AND_TAG = re.compile(rf"(?<![ \t])[ \t]*{TAG.pattern}", re.IGNORECASE)

LoraSpecKind = Literal["id", "url", "file", "hub"]


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """One LoRA as a request asks for it."""

    kind: LoraSpecKind
    weight: float
    reference: str = ""  # of kind id: id or name; url: the URL; hub: the hub id
    file: bytes | SpooledFile | None = None  # of kind file
    param: str = "loras"  # the request's field that asks for it, for messages


def extract_lora_tags(prompt: str) -> tuple[str, tuple[LoraSpec, ...]]:
    """The prompt without its `<lora:name:weight>` tags, and their LoRAs; the weight is 1 where a tag has
    none.

    Raises BadRequest for a tag without a name or with a weight that is no number or out of range.
    """
    specs = tuple([_parse_tag(match[1]) for match in TAG.finditer(prompt)])
    if not specs:
        return prompt, ()
    return BLANKS_AND_TAG.sub("", prompt).strip(), specs


def check_weight(weight: float, param: str) -> float:
    """The weight. Raises BadRequest unless it is -MAX_LORA_WEIGHT to MAX_LORA_WEIGHT."""
    if not math.isfinite(weight) or abs(weight) > MAX_LORA_WEIGHT:
        raise BadRequest(
            f"the weight of a LoRA is -{MAX_LORA_WEIGHT:g} to {MAX_LORA_WEIGHT:g}, not {weight:g}",
            param=param,
        )
    return weight


def _parse_tag(text: str) -> LoraSpec:
    """Of "name", "name:weight" or "name:weight:weight" with equal weights (denoiser and text encoder)."""
    name, *weights = [part.strip() for part in text.split(":")]
    try:
        numbers = [float(weight) for weight in weights]
    except ValueError:
        numbers = []
    if not name or len(numbers) != len(weights) or len(set(numbers)) > 1 or len(numbers) > 2:
        raise BadRequest(
            f"<lora:{text[:100]}> cannot be read; write <lora:name:weight>, with one weight",
            param="prompt",
        )
    return LoraSpec("id", check_weight(numbers[0] if numbers else 1.0, "prompt"), name, param="prompt")
