"""The header of a LoRA's safetensors file, parsed under limits. Loads no torch and reads no tensor.

Layout (github.com/huggingface/safetensors): 8 bytes with the size of the header (little endian), the header
as JSON (tensor name -> dtype, shape, data_offsets; "__metadata__" -> str to str), the tensors. What trainers
write into the metadata may be megabytes (tags of all captions); the table of tensors may not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # typeshed does not list it
from mmap import mmap
from typing import Any

from deployments.lora_format.tensor_groups import TensorGroups, group_tensors
from deployments.protocol.errors import BadRequest, TooLarge

FileBytes = bytes | memoryview | mmap

SIZE_BYTES = 8  # before the header
MAX_HEADER_BYTES = 16 * 2**20  # as text it takes up to four times as much memory
MAX_FILE_BYTES = 2 * 2**30
MAX_TENSORS = 8192
MAX_ENTRY_CHARS = 1024  # of a tensor's dtype, shape and offsets
MAX_BLOCK_DIGITS = 4
MAX_NAME_CHARS = 500
MAX_DIMENSIONS = 5
FACTOR_DTYPES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1}  # bytes of a value
NUMBER_DTYPES = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}  # of alphas alone
DTYPE_BYTES = FACTOR_DTYPES | NUMBER_DTYPES
METADATA = "__metadata__"
MAX_METADATA_ENTRIES = 4096
MAX_METADATA_CHARS = 4 * 2**20  # of a value; longer ones are not kept
ADAPTER_METADATA = "lora_adapter_metadata"  # where diffusers' save_lora_weights writes peft's settings
PICKLE_MAGIC = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

_SPACE = re.compile(r"[ \t\r\n]*")
_VALUES = json.JSONDecoder(object_pairs_hook=lambda pairs: _without_duplicates(pairs))


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
    groups: TensorGroups  # of these tensors
    metadata: Mapping[str, str]  # entries of at most MAX_METADATA_CHARS
    size_bytes: int  # of the header; the tensors begin after SIZE_BYTES more


def refusal(reason: str) -> BadRequest:
    """The error for a LoRA file that is not accepted. reason: a clause that begins with "it" or "its"."""
    return BadRequest(f"the LoRA is refused: {reason}", param="loras")


def read_header(file: FileBytes) -> LoraHeader:
    """The header of a whole safetensors file; see `header_bytes` and `parse_header`."""
    with memoryview(file) as view:
        size = header_bytes(bytes(view[:SIZE_BYTES]), len(view))
        return parse_header(bytes(view[SIZE_BYTES : SIZE_BYTES + size]), len(view))


def header_bytes(start: bytes, file_bytes: int) -> int:
    """The size of the header. start: of the file, SIZE_BYTES at least where it has them.

    Raises TooLarge over MAX_FILE_BYTES, BadRequest for what is no safetensors file or has a longer header
    than MAX_HEADER_BYTES or than the file.
    """
    if file_bytes > MAX_FILE_BYTES:
        raise TooLarge(f"the LoRA has {file_bytes} bytes; at most {MAX_FILE_BYTES}", param="loras")
    if start.startswith(PICKLE_MAGIC):
        raise refusal("it is a pickle (.pt, .bin, .ckpt), which may run code; convert it to safetensors")
    if len(start) < SIZE_BYTES:
        raise refusal("it is no safetensors file; it ends before its header")
    size = int.from_bytes(start[:SIZE_BYTES], "little")
    if size > MAX_HEADER_BYTES:
        raise refusal(
            f"it is no safetensors file, or its header is over {MAX_HEADER_BYTES} bytes; "
            "save it without the trainer's metadata"
        )
    if SIZE_BYTES + size > file_bytes:
        raise refusal("it is truncated; its header announces more bytes than it has")
    return size


def parse_header(header: bytes, file_bytes: int | None) -> LoraHeader:
    """The checked header. header: all of it, without its size. file_bytes: of the whole file; None: of a file
    that was accepted before.

    Raises BadRequest for a header that is not readable, is forged, or is over a limit of this module, and
    for a file that is truncated.
    """
    table, metadata = _parse(header)
    if not table:
        raise refusal("it holds no tensors")
    tensors = {key: _checked_entry(key, value) for key, value in table.items()}
    if file_bytes is not None:
        _check_offsets(tensors, file_bytes - SIZE_BYTES - len(header))
    return LoraHeader(tensors, group_tensors(tensors), metadata, len(header))


def shortened(text: str) -> str:
    """The text quoted for a message, at most 120 characters of it."""
    return repr(text if len(text) <= 120 else text[:117] + "...")


def _parse(header: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The table of tensors and the metadata, read entry by entry: no more than the limits is kept."""
    try:
        text = header.decode("utf-8")
        if not text.lstrip().startswith("{"):
            json.loads(text[: 2 * MAX_ENTRY_CHARS])
            raise refusal("its header is no table of tensors")
        return _Table(text).read()
    except (ValueError, RecursionError, IndexError) as error:  # the errors of JSON and UTF-8 are ValueErrors
        raise refusal(f"its header is not readable ({type(error).__name__})") from None


class _Table:
    """A reader of the header's JSON object."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def read(self) -> tuple[dict[str, Any], dict[str, str]]:
        tensors: dict[str, Any] = {}
        metadata: dict[str, str] | None = None
        for key in self._keys():
            if key == METADATA and metadata is None:
                metadata = self._metadata()
            elif key == METADATA or key in tensors:
                raise ValueError("a name occurs twice")
            elif len(tensors) == MAX_TENSORS:
                raise refusal(
                    f"its table of tensors has over {MAX_TENSORS} entries; at most {MAX_TENSORS} are read"
                )
            else:
                tensors[key] = self._entry(key)
        if self._text[self._at :].strip():
            raise ValueError("there is text after the table")
        return tensors, metadata or {}

    def _keys(self) -> Any:
        """The keys of the object that begins here; the caller reads each value before the next key."""
        self._expect("{")
        if self._next() == "}":
            self._at += 1
            return
        while True:
            self._expect('"')
            key, self._at = scanstring(self._text, self._at, True)
            self._expect(":")
            yield key
            if self._next() == "}":
                self._at += 1
                return
            self._expect(",")

    def _metadata(self) -> dict[str, str]:
        if self._next() != "{":
            raise refusal("its metadata is not a table of texts")
        kept: dict[str, str] = {}
        for key in self._keys():
            if self._next() != '"':
                raise refusal("its metadata is not a table of texts")
            value, self._at = scanstring(self._text, self._at + 1, True)
            if key in kept:
                raise ValueError("a name occurs twice")
            if len(value) <= MAX_METADATA_CHARS:
                kept[key] = value
            elif key == ADAPTER_METADATA:
                raise refusal(f"its metadata entry {key} is over {MAX_METADATA_CHARS} characters; correct it")
            if len(kept) > MAX_METADATA_ENTRIES:
                raise refusal(
                    f"its metadata has over {MAX_METADATA_ENTRIES} entries; save it without the tags"
                )
        return kept

    def _entry(self, key: str) -> Any:
        """One value, of which no more than MAX_ENTRY_CHARS are looked at."""
        if len(key) > MAX_NAME_CHARS:
            raise refusal(f"{shortened(key)} is no name of a layer; its table of tensors has too long names")
        self._next()
        part = self._text[self._at : self._at + MAX_ENTRY_CHARS]
        value, size = _VALUES.raw_decode(part)
        self._at += size
        return value

    def _next(self) -> str:
        """The next character that is no space."""
        space = _SPACE.match(self._text, self._at)
        assert space is not None, "the pattern matches nothing too"
        self._at = space.end()
        return self._text[self._at]

    def _expect(self, character: str) -> None:
        if self._next() != character:
            raise ValueError(f"there is no {character}")
        self._at += 1


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _checked_entry(key: str, value: object) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise refusal(f"its entry for {shortened(key)} is not dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        kinds = ", ".join(FACTOR_DTYPES)
        raise refusal(
            f"{shortened(key)} is of type {shortened(str(dtype))}; save it as one of {kinds}, "
            "a whole number only as an alpha"
        )
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
