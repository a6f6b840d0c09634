"""The header of a GGUF file, parsed under limits. Loads no torch and reads no tensor.

Layout (github.com/ggml-org/ggml, docs/gguf.md), little endian: the magic, the version, the number of tensors
and of metadata entries; the entries (key, type, value); of each tensor its name, dimensions, type and offset;
then, aligned, the tensors. The reader of the library gguf makes Python objects of every array element: 2 MiB
of a header take it 1.4 GiB and half a minute. Here arrays are passed over, and no number of the file is
believed before it is compared with the file's size.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from deployments.gguf_format.tensor_types import COMPUTED, OTHERS, TensorType
from deployments.protocol.errors import ModelFailed

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT, LEAST_ALIGNMENT = 32, 8  # bytes; where the file names none
MAX_HEADER_BYTES = 64 * 2**20  # the vocabularies of language models are in it
MAX_TENSORS = 65_536
MAX_ENTRIES = 65_536
MAX_NAME_BYTES = 1024
MAX_VALUE_BYTES = 4096  # of a text that is kept
MAX_DIMENSIONS = 5  # ggml has four; files of video models have convolutions with five
MAX_VALUES = 2**50  # of a tensor
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
# by ComfyUI-GGUF: the shapes of tensors that were reshaped for their blocks
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."

Scalar = str | int | float | bool


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor as the header describes it."""

    name: str
    type: TensorType
    number: int  # of the type
    shape: tuple[int, ...]  # as torch has it: rows first, values of a row last
    start: int  # bytes from the beginning of the file
    original_shape: tuple[int, ...] | None = None  # where it was reshaped for its blocks

    @property
    def values(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.values // self.type.block * self.type.block_bytes


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The checked header of a whole file."""

    path: Path
    metadata: Mapping[str, Scalar]  # without arrays and long texts
    tensors: Mapping[str, GgufTensor]  # by name, at least one

    @property
    def architecture(self) -> str | None:
        """What model it says to be of, such as "flux"."""
        found = self.metadata.get("general.architecture")
        return found if isinstance(found, str) else None


def read_header(path: Path) -> GgufHeader:
    """The header of the file at this path.

    Raises ModelFailed with the cause and the cure for a file that is no GGUF file, is cut, or has tensors
    that cannot be computed with; OSError.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        return _Reader(path, file, size).header()


def refusal(path: Path, cause: str, cure: str) -> ModelFailed:
    """The error for a file that is not used. cause: a clause that begins with "it" or "its"."""
    return ModelFailed(f"the GGUF file {path} cannot be used: {cause}; {cure}")


AGAIN = "fetch it again"


class _Reader:
    """Reads a header from its beginning to its end."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path = path
        self._file = file
        self._size = size
        self._at = 0

    def header(self) -> GgufHeader:
        self._check_begin()
        tensor_count, entry_count = self._numbers("QQ")
        if not 0 < tensor_count <= MAX_TENSORS or entry_count > MAX_ENTRIES:
            raise self._refusal(
                f"its header lists {tensor_count} tensors and {entry_count} entries (at most {MAX_TENSORS} "
                f"and {MAX_ENTRIES})"
            )
        metadata: dict[str, Scalar] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for _ in range(entry_count):
            self._entry(metadata, shapes)
        listed = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < LEAST_ALIGNMENT or alignment & (alignment - 1):
            raise self._refusal(f"its alignment is {alignment!r} and not 8, 16, 32 or so")
        begin = -(-self._at // alignment) * alignment
        return GgufHeader(self._path, metadata, self._placed(listed, shapes, begin, alignment))

    def _check_begin(self) -> None:
        magic = self._bytes(4) if self._size >= 4 else b""
        if magic != MAGIC:
            kind = "the pointer that git keeps in place of one" if magic == b"vers" else "none"
            cause = f"it is {kind} (it does not begin with GGUF)"
            raise self._refusal(cause, "name a file of llama.cpp's format")
        (version,) = self._numbers("I")
        if version in VERSIONS:
            return
        if version and version & 0xFFFF == 0:
            raise self._refusal("it is for machines with the other byte order", "use one of little endian")
        raise self._refusal(
            f"it has version {version} of the format, and {' and '.join(map(str, VERSIONS))} are read",
            "convert it with a current version of llama.cpp or ComfyUI-GGUF",
        )

    def _entry(self, metadata: dict[str, Scalar], shapes: dict[str, tuple[int, ...]]) -> None:
        """One entry of the metadata, into these."""
        key = self._text(MAX_NAME_BYTES)
        (kind,) = self._numbers("I")
        if kind in SCALARS:
            (metadata[key],) = self._numbers(SCALARS[kind])
        elif kind == TEXT:
            text = self._text_or_none()
            if text is not None:
                metadata[key] = text
        elif kind == ARRAY:
            shape = self._array(keep=key.startswith(ORIGINAL_SHAPE))
            if shape:
                shapes[key.removeprefix(ORIGINAL_SHAPE)] = shape
        else:
            raise self._refusal(f"its entry {key!r} has the unknown type {kind}")

    def _array(self, *, keep: bool) -> tuple[int, ...]:
        """Pass over an array; its numbers where they are kept, and are a shape."""
        kind, count = self._numbers("IQ")
        if kind == TEXT:
            self._check_end(8 * count)
            for _ in range(count):
                (length,) = self._numbers("Q")
                self._skip(length)
            return ()
        if kind not in SCALARS:
            raise self._refusal(f"its header has an array of the type {kind}")
        if keep and 0 < count <= MAX_DIMENSIONS and SCALARS[kind] in "IiQq":
            return tuple(int(size) for size in self._numbers(SCALARS[kind] * count))
        self._skip(count * struct.calcsize("<" + SCALARS[kind]))
        return ()

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of one tensor."""
        name = self._text(MAX_NAME_BYTES)
        (dimensions,) = self._numbers("I")
        if not 0 < dimensions <= MAX_DIMENSIONS:
            raise self._refusal(f"its tensor {name!r} has {dimensions} dimensions (at most {MAX_DIMENSIONS})")
        sizes = self._numbers("Q" * dimensions)
        kind, offset = self._numbers("IQ")
        return name, tuple(reversed(sizes)), kind, offset

    def _placed(
        self,
        listed: list[tuple[str, tuple[int, ...], int, int]],
        shapes: Mapping[str, tuple[int, ...]],
        begin: int,
        alignment: int,
    ) -> dict[str, GgufTensor]:
        """The tensors by name, each within the file and beside the others."""
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in listed:
            if name in tensors:
                raise self._refusal(f"it has two tensors {name!r}")
            if kind not in COMPUTED:
                raise self._refusal(
                    f"its tensor {name!r} has the type {OTHERS.get(kind, kind)}, which is not computed with",
                    f"use a file with types of {', '.join(one.name for one in COMPUTED.values())}",
                )
            original = shapes.get(name)
            tensor = GgufTensor(name, COMPUTED[kind], kind, shape, begin + offset, original)
            if not 0 < tensor.values <= MAX_VALUES or shape[-1] % tensor.type.block or offset % alignment:
                raise self._refusal(f"its tensor {name!r} has the shape {shape} at the offset {offset}")
            if original is not None and math.prod(original) != tensor.values:
                raise self._refusal(f"its tensor {name!r} has the shape {shape} and was {original} before")
            tensors[name] = tensor
        self._check_places(sorted(tensors.values(), key=lambda tensor: tensor.start))
        return tensors

    def _check_places(self, tensors: list[GgufTensor]) -> None:
        needed = max(tensor.start + tensor.nbytes for tensor in tensors)
        if needed > self._size:
            raise self._refusal(f"it is cut: its tensors end at byte {needed}, and it has {self._size} bytes")
        for one, other in pairwise(tensors):
            if one.start + one.nbytes > other.start:
                raise self._refusal(f"its tensors {one.name!r} and {other.name!r} overlap")

    def _text(self, most: int) -> str:
        (length,) = self._numbers("Q")
        if length > most:
            raise self._refusal(f"a name in its header has {length} bytes (at most {most})")
        return self._decoded(self._bytes(length))

    def _text_or_none(self) -> str | None:
        """A text of the metadata; None for a long one."""
        (length,) = self._numbers("Q")
        if length > MAX_VALUE_BYTES:
            self._skip(length)
            return None
        return self._decoded(self._bytes(length))

    def _decoded(self, text: bytes) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self._refusal("a name in its header is not UTF-8") from None

    def _numbers(self, form: str) -> tuple[int, ...]:
        return struct.unpack(f"<{form}", self._bytes(struct.calcsize(f"<{form}")))

    def _bytes(self, count: int) -> bytes:
        self._check_end(count)
        self._at += count
        return self._file.read(count)

    def _skip(self, count: int) -> None:
        self._check_end(count)
        self._at += count
        self._file.seek(self._at)

    def _check_end(self, count: int) -> None:
        """Raises ModelFailed unless so many bytes follow, in what may be the header."""
        if self._at + count > self._size:
            raise self._refusal(f"it is cut: its header goes beyond its {self._size} bytes")
        if self._at + count > MAX_HEADER_BYTES:
            raise self._refusal(f"its header has more than {MAX_HEADER_BYTES} bytes", "use another file")

    def _refusal(self, cause: str, cure: str = AGAIN) -> ModelFailed:
        return refusal(self._path, cause, cure)
