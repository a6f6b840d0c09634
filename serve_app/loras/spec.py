"""Which LoRAs a request asks for, before anybody has looked for them (pure)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from deployments.protocol.errors import BadRequest
from deployments.protocol.request import MAX_LORA_WEIGHT

TAG = re.compile(r"<lora:([^<>]*)>", re.IGNORECASE)

LoraSpecKind = Literal["id", "url", "file", "hub"]


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """One adapter as it was asked for."""

    kind: LoraSpecKind
    weight: float
    reference: str = ""  # id or name, URL, or hub id
    file: bytes | None = None  # kind file
    param: str = "loras"  # the field that asks for it


def extract_lora_tags(prompt: str) -> tuple[str, tuple[LoraSpec, ...]]:
    """The prompt without its `<lora:name:weight>`, and what they ask for; weight is 1 where there is none.

    Raises BadRequest for a tag that says neither a name nor a proper weight.
    """
    specs = tuple([_tagged(match[1]) for match in TAG.finditer(prompt)])
    if not specs:
        return prompt, ()
    bare = re.sub(rf"[ \t]*{TAG.pattern}", "", prompt, flags=re.IGNORECASE)
    return bare.strip(), specs


def check_weight(weight: float, param: str) -> float:
    """The weight, -2 to 2."""
    if not math.isfinite(weight) or abs(weight) > MAX_LORA_WEIGHT:
        raise BadRequest(
            f"the weight of a LoRA is -{MAX_LORA_WEIGHT:g} to {MAX_LORA_WEIGHT:g}, not {weight:g}",
            param=param,
        )
    return weight


def _tagged(text: str) -> LoraSpec:
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
