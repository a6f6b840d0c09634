"""What a LoRA file is, by its header and its values, or the reason for its refusal. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from deployments.lora_format.change_shape import change_shape
from deployments.lora_format.classify import KeyStyle, LoraFamily, key_style, model_family, trigger_words
from deployments.lora_format.header import (
    DTYPE_BYTES,
    SIZE_BYTES,
    FileBytes,
    LoraHeader,
    read_header,
    refusal,
    shortened,
)
from deployments.lora_format.value_check import CheckedValues, check_values

MAX_RANK = 256
MAX_SUM_RANK = 1024  # of a LoHa, whose change has the product of its two ranks
_MAX_METADATA_ENTRIES = 64
_MAX_METADATA_CHARS = 2_000  # of one value
_MAX_NAME_CHARS = 200


@dataclass(frozen=True, slots=True)
class LoraFileInfo:
    """What is known of an accepted file. Whether it fits a model is decided by placement.place, and on
    loading."""

    rank: int  # the largest of all layers, 1..MAX_RANK; of a LoKr with whole factors, any
    tensors: int
    dtype: str  # a key of DTYPE_BYTES; the most frequent
    size_bytes: int
    style: KeyStyle
    family: LoraFamily  # a guess
    name: str = ""  # from the metadata
    trigger_words: tuple[str, ...] = ()  # from the metadata, the most frequent first
    metadata: Mapping[str, str] = field(default_factory=dict)  # at most 64 entries of 2,000 characters
    notes: tuple[str, ...] = ()  # sentences: what is in the file without effect, or is missing


def inspect_lora(file: FileBytes) -> LoraFileInfo:
    """What the LoRA file is. file: its bytes, or a memory map of it.

    Raises BadRequest with the reason (TooLarge over 2 GiB): not safetensors, truncated, forged, not a LoRA,
    of a type that is not served (OFT, IA3 and others), over a limit, or with values that are no numbers or
    absurd. Reads every value once: about a second for 512 MiB.
    """
    return inspect_file(file)[1]


def inspect_file(file: FileBytes) -> tuple[LoraHeader, LoraFileInfo, CheckedValues]:
    """The header, what inspect_lora gives, and what the values are. Raises BadRequest as it does."""
    header = read_header(file)
    with memoryview(file) as view, view[SIZE_BYTES + header.size_bytes :] as data:
        info = lora_info(header, len(view))
        values = check_values(header, lambda start, end: data[start:end])
    return header, replace(info, notes=values.notes), values


def lora_info(header: LoraHeader, size_bytes: int) -> LoraFileInfo:
    """What the LoRA with this header is, without a look at its values. size_bytes: of the whole file.

    Raises BadRequest.
    """
    tensors, metadata = header.tensors, header.metadata
    kept = list(metadata.items())[:_MAX_METADATA_ENTRIES]
    dtypes = [entry.dtype for entry in tensors.values()]
    return LoraFileInfo(
        rank=_rank(header),
        tensors=len(tensors),
        dtype=max(DTYPE_BYTES, key=dtypes.count),
        size_bytes=size_bytes,
        style=key_style(tensors),
        family=model_family(tensors, metadata),
        name=(metadata.get("modelspec.title") or metadata.get("ss_output_name") or "")[:_MAX_NAME_CHARS],
        trigger_words=trigger_words(metadata),
        metadata={key[:_MAX_NAME_CHARS]: value[:_MAX_METADATA_CHARS] for key, value in kept},
    )


def _rank(header: LoraHeader) -> int:
    """The largest rank. Raises BadRequest where there is none, or one is over a limit."""
    largest = 0
    reasons = [problem.reason for problem in header.groups.problems]
    for module in header.groups.modules:
        shape = change_shape(module, header.tensors)
        if isinstance(shape, str):
            reasons.append(shape)  # refused by check_values, unless it is zero
            continue
        largest = max(largest, shape.rank)
        name = shortened(module.first)
        if module.network == "lora" and shape.rank > MAX_RANK:
            raise refusal(
                f"its rank is {shape.rank} ({name}); at most {MAX_RANK} are served: resize it, for example "
                "with kohya's resize_lora.py"
            )
        if module.network == "loha" and shape.sum_rank > MAX_SUM_RANK:
            raise refusal(
                f"its ranks multiply to {shape.sum_rank} ({name}); at most {MAX_SUM_RANK} are served: train "
                "the LoHa with a smaller dimension, or extract it as a LoRA"
            )
    if not largest:
        raise refusal(next(iter(reasons), "it has no layer with a rank"))
    return largest
