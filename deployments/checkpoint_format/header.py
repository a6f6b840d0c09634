"""The header of a checkpoint in one safetensors file, parsed under limits. Reads no tensor.

Layout (github.com/huggingface/safetensors): 8 bytes with the size of the header (little endian), the header
as JSON (tensor name -> dtype, shape, data_offsets; "__metadata__" -> str to str), the tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.protocol.errors import ModelFailed

SIZE_BYTES = 8  # before the header
MAX_HEADER_BYTES = 100_000_000  # of the format
MAX_TENSORS = 65_536
MAX_NAME_CHARS = 500
METADATA = "__metadata__"
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}  # bytes of a value
DTYPES = FLOATS | {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
PICKLE_MAGIC = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
AGAIN = "fetch the file again"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor as the header describes it."""

    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CheckpointHeader:
    """The checked header of a whole file."""

    path: Path
    tensors: Mapping[str, Tensor]  # by name, at least one
    metadata: Mapping[str, str]


def refusal(path: Path, cause: str, cure: str) -> ModelFailed:
    """The error for a file that is not used. cause: a clause that begins with "it" or "its"."""
    return ModelFailed(f"the checkpoint {path} cannot be used: {cause}; {cure}")


def read_header(path: Path) -> CheckpointHeader:
    """The header of the file at this path.

    Raises ModelFailed with the cause and the cure for a file that is no safetensors file, is cut, or whose
    tensors do not lie in it one after the other; also where it cannot be opened.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(SIZE_BYTES)
            _check_begin(path, begin, size)
            text = file.read(int.from_bytes(begin, "little"))
    except OSError as error:
        raise refusal(
            path, f"it cannot be read ({error.strerror})", "correct the path or its permissions"
        ) from error
    return _parsed(path, text, size)


def _check_begin(path: Path, begin: bytes, size: int) -> None:
    if path.suffix.lower() in PICKLES or begin.startswith(PICKLE_MAGIC):
        cause = "it is a pickle, which runs code of its author when it is opened"
        raise refusal(path, cause, "use the safetensors file of the same model, or convert it elsewhere")
    header = int.from_bytes(begin, "little")
    if len(begin) < SIZE_BYTES or not 2 <= header <= MAX_HEADER_BYTES:
        raise refusal(path, "it is no safetensors file", "name a file in the format safetensors")
    if SIZE_BYTES + header > size:
        raise refusal(path, f"it is cut: {size} bytes are less than its header has", AGAIN)


def _parsed(path: Path, text: bytes, size: int) -> CheckpointHeader:
    try:
        found = json.loads(text, object_pairs_hook=_without_duplicates)
        metadata = found.pop(METADATA, {})
        entries = {name: _tensor(entry) for name, entry in found.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise refusal(path, f"its header is damaged ({error})", AGAIN) from error
    if not 0 < len(entries) <= MAX_TENSORS or any(len(name) > MAX_NAME_CHARS for name in entries):
        raise refusal(path, f"its header lists {len(entries)} tensors (1 to {MAX_TENSORS})", AGAIN)
    end, place = 0, SIZE_BYTES + len(text)
    for name, (tensor, start, stop) in sorted(entries.items(), key=lambda entry: entry[1][1:]):
        if start != end or stop - start != math.prod(tensor.shape) * DTYPES[tensor.dtype]:
            raise refusal(path, f"its tensor {name} is not where its header has it", AGAIN)
        end = stop
    if place + end != size:
        what = "cut" if place + end > size else "longer than its tensors"
        raise refusal(path, f"it is {what}: {size} bytes, and its header says {place + end}", AGAIN)
    texts = {key: value for key, value in metadata.items() if isinstance(value, str)}
    return CheckpointHeader(path, {name: tensor for name, (tensor, _, _) in entries.items()}, texts)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is in it twice")
    return found


def _tensor(entry: Mapping[str, Any]) -> tuple[Tensor, int, int]:
    dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    sizes = [*shape, start, stop]
    if dtype not in DTYPES or not all(type(value) is int and value >= 0 for value in sizes):
        raise ValueError(f"a tensor of dtype {str(dtype)[:20]!r}")
    return Tensor(dtype, tuple(shape)), start, stop
