"""The header of a LoRA's safetensors file, parsed under limits. Loads no torch and reads no tensor.

Layout (github.com/huggingface/safetensors): 8 bytes with the size of the header (little endian), the header
as JSON (tensor name -> dtype, shape, data_offsets; "__metadata__" -> str to str), the tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deployments.protocol.errors import BadRequest, TooLarge

MAX_HEADER_BYTES = 2**20  # a 63 MB header with a million empty tensors opens in 10 s and takes 421 MiB
HEAD_BYTES = 8 + MAX_HEADER_BYTES  # the start of a file that certainly contains its header
MAX_FILE_BYTES = 512 * 2**20
MAX_TENSORS = 4096
MAX_BLOCK_DIGITS = 4  # diffusers' converters count up to the largest block number in the keys
MAX_DIMENSIONS = 5
DTYPE_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
METADATA = "__metadata__"
PICKLE_MAGIC = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as the header describes it."""

    dtype: str  # a key of DTYPE_BYTES
    shape: tuple[int, ...]
    start: int  # bytes from the end of the header
    end: int


@dataclass(frozen=True, slots=True)
class LoraHeader:
    """The checked header of a whole file."""

    tensors: Mapping[str, TensorEntry]  # by name, at least one
    metadata: Mapping[str, str]


def refusal(reason: str) -> BadRequest:
    """The error for a LoRA file that is not accepted. reason: a clause that begins with "it" or "its"."""
    return BadRequest(f"the LoRA is refused: {reason}", param="loras")


def read_header(file: bytes) -> LoraHeader:
    """The header of a whole safetensors file.

    Raises TooLarge over MAX_FILE_BYTES, BadRequest for a file that is not safetensors, is truncated or
    forged, or is over a limit of this module.
    """
    if len(file) > MAX_FILE_BYTES:
        raise TooLarge(f"the LoRA has {len(file)} bytes; at most {MAX_FILE_BYTES}", param="loras")
    table = _parse(file)
    metadata = _checked_metadata(table.pop(METADATA, None))
    if not table:
        raise refusal("it holds no tensors")
    if len(table) > MAX_TENSORS:
        raise refusal(f"it holds {len(table)} tensors; at most {MAX_TENSORS}")
    tensors = {key: _checked_entry(key, value) for key, value in table.items()}
    _check_offsets(tensors, len(file) - 8 - int.from_bytes(file[:8], "little"))
    return LoraHeader(tensors, metadata)


def tensor_shapes(head: bytes) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by name. head: the first HEAD_BYTES, or all, of a file that was accepted."""
    return {key: tuple(value["shape"]) for key, value in _parse(head).items() if key != METADATA}


def shortened(text: str) -> str:
    """The text quoted for a message, at most 120 characters of it."""
    return repr(text if len(text) <= 120 else text[:117] + "...")


def _parse(file: bytes) -> dict[str, Any]:
    """The header's JSON table, parsed only after its size is known to be small."""
    if file.startswith(PICKLE_MAGIC):
        raise refusal("it is a pickle (.pt, .bin, .ckpt), which may run code; convert it to safetensors")
    if len(file) < 8:
        raise refusal("it is no safetensors file; it ends before its header")
    size = int.from_bytes(file[:8], "little")
    if size > MAX_HEADER_BYTES:
        raise refusal(f"it is no safetensors file, or its header is over {MAX_HEADER_BYTES} bytes")
    if 8 + size > len(file):
        raise refusal("it is truncated; its header announces more bytes than it has")
    try:
        table = json.loads(file[8 : 8 + size].decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # the errors of JSON and UTF-8 are ValueErrors
        raise refusal(f"its header is not readable ({type(error).__name__})") from None
    if not isinstance(table, dict):
        raise refusal("its header is no table of tensors")
    return table


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _checked_metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise refusal("its metadata is not a table of texts")
    return value


def _checked_entry(key: str, value: object) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise refusal(f"its entry for {shortened(key)} is not dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise refusal(f"{shortened(key)} is of type {shortened(str(dtype))}; use F16, BF16 or F32")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS or not _are_sizes(offsets) or len(offsets) != 2:
        raise refusal(f"{shortened(key)} has no valid shape and offsets")
    if not key.isprintable() or re.search(rf"\d{{{MAX_BLOCK_DIGITS + 1}}}", key):
        raise refusal(f"{shortened(key)} is no name of a layer")
    entry = TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])
    if entry.end - entry.start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise refusal(f"{shortened(key)} has another size than its shape and type need")
    return entry


def _are_sizes(value: object) -> bool:
    """Whether this is a list of plain integers from 0 to 2^40."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= 2**40 for item in value)


def _check_offsets(tensors: Mapping[str, TensorEntry], data_bytes: int) -> None:
    """Raises BadRequest unless the tensors fill the data_bytes after the header without gap or overlap."""
    at = 0
    for key, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            raise refusal(f"{shortened(key)} overlaps the tensor before it or leaves a gap")
        at = entry.end
    if at > data_bytes:
        raise refusal("it is truncated; its tensors end after the file does")
    if at < data_bytes:
        raise refusal("it has bytes after its last tensor")
