"""What a LoRA file is, by its header alone, or the reason for its refusal. Loads no torch and reads no
tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deployments.lora_format.classify import (
    UNSUPPORTED,
    KeyStyle,
    LoraFamily,
    LoraNetwork,
    key_style,
    model_family,
    network_type,
    trigger_words,
)
from deployments.lora_format.header import DTYPE_BYTES, LoraHeader, read_header, refusal, shortened

MAX_RANK = 128
_DOWN = (".lora_A.weight", ".lora_down.weight", "lora.down.weight", "lora1.down.weight", "lora2.down.weight",
         "lora_linear_layer.down.weight")  # fmt: skip
_MAX_METADATA_ENTRIES = 64
_MAX_METADATA_CHARS = 2_000  # of one value
_MAX_NAME_CHARS = 200


@dataclass(frozen=True, slots=True)
class LoraFileInfo:
    """The header of an accepted file. Whether the LoRA fits a model is decided by shape_check and on
    loading."""

    rank: int  # the largest of all layers, 1..MAX_RANK
    tensors: int
    dtype: str  # "F16", "BF16" or "F32"; the most frequent
    size_bytes: int
    style: KeyStyle
    family: LoraFamily  # a guess
    network: LoraNetwork
    name: str = ""  # from the metadata
    trigger_words: tuple[str, ...] = ()  # from the metadata, the most frequent first
    metadata: Mapping[str, str] = field(default_factory=dict)  # at most 64 entries of 2,000 characters


def inspect_lora(file: bytes) -> LoraFileInfo:
    """What the LoRA file is.

    Raises BadRequest with the reason (TooLarge over 512 MiB): not safetensors, truncated, forged, not a LoRA,
    of a type that is not served (DoRA, LoKr, LoHa and others), or over a limit. Takes milliseconds for any
    input.
    """
    return lora_info(read_header(file), len(file))


def lora_info(header: LoraHeader, size_bytes: int) -> LoraFileInfo:
    """What the LoRA with this header is. size_bytes: of the whole file. Raises BadRequest as inspect_lora
    does."""
    tensors, metadata = header.tensors, header.metadata
    network = network_type(tensors)
    if network == "other":
        raise refusal(f"its keys are not those of a LoRA (the first is {shortened(next(iter(tensors)))})")
    if network in UNSUPPORTED:
        raise refusal(UNSUPPORTED[network])
    ranks = [entry.shape[0] for key, entry in tensors.items() if key.endswith(_DOWN) and entry.shape]
    rank = max(ranks, default=0)
    if rank > MAX_RANK:
        raise refusal(f"its rank is {rank}; at most {MAX_RANK}")
    if not rank:
        raise refusal("it has no layer with a rank")
    dtypes = [entry.dtype for entry in tensors.values()]
    kept = list(metadata.items())[:_MAX_METADATA_ENTRIES]
    return LoraFileInfo(
        rank=rank,
        tensors=len(tensors),
        dtype=max(DTYPE_BYTES, key=dtypes.count),
        size_bytes=size_bytes,
        style=key_style(tensors),
        family=model_family(tensors, metadata),
        network=network,
        name=(metadata.get("modelspec.title") or metadata.get("ss_output_name") or "")[:_MAX_NAME_CHARS],
        trigger_words=trigger_words(metadata),
        metadata={key[:_MAX_NAME_CHARS]: value[:_MAX_METADATA_CHARS] for key, value in kept},
    )
