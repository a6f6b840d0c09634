"""Headers of GGUF files are read as the library gguf writes them, and hostile ones cost nothing."""

from __future__ import annotations

import math
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import pytest
import torch
from torch import nn

from deployments.gguf_format.header import MAX_TENSORS, read_header
from deployments.gguf_format.sizes import form, loaded_bytes, workspace_bytes
from deployments.gguf_format.tensor_types import COMPUTED, OTHERS, QUANTISED
from deployments.protocol.errors import ModelFailed
from tests.inference.gguf_files import write_gguf

Tensor = tuple[str, Sequence[int], int, int]  # name, sizes as the file lists them, type, offset
F32, Q8_0 = 0, 8
HUGE = 2**62


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def file_of(
    path: Path,
    tensors: Sequence[Tensor] = (("a", (64,), F32, 0),),
    entries: Sequence[bytes] = (),
    *,
    begin: bytes = b"GGUF\x03\0\0\0",
    counts: tuple[int, int] | None = None,
    data: int = 256,
) -> Path:
    """A file with this header and so many bytes after it."""
    header = begin + struct.pack("<QQ", *(counts or (len(tensors), len(entries)))) + b"".join(entries)
    for name, sizes, kind, offset in tensors:
        header += text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        header += struct.pack("<IQ", kind, offset)
    path.write_bytes(header + b"\0" * (-len(header) % 32 + data))
    return path


def test_a_file_of_the_library_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 5))
    path = write_gguf(tmp_path / "net.gguf", net, "Q8_0")

    header = read_header(path)

    assert header.architecture == "flux"
    found = {name: (tensor.type.name, tensor.shape) for name, tensor in header.tensors.items()}
    assert found == {
        "0.weight": ("Q8_0", (8, 64)),
        "0.bias": ("F32", (8,)),
        "1.weight": ("F32", (5, 8)),
        "1.bias": ("F32", (5,)),
    }
    tensor = header.tensors["1.weight"]
    stored = path.read_bytes()[tensor.start : tensor.start + tensor.nbytes]
    assert torch.equal(torch.frombuffer(bytearray(stored), dtype=torch.float32).view(5, 8), net[1].weight)


def test_types_have_the_sizes_that_the_library_has() -> None:
    library = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}

    assert {number: (one.block, one.block_bytes) for number, one in COMPUTED.items()} == {
        number: library[number] for number in COMPUTED
    }
    assert {number: one.name for number, one in COMPUTED.items()} | dict(OTHERS) == {
        int(kind): kind.name for kind in gguf.GGMLQuantizationType
    }


def test_bytes_are_those_of_blocks_and_of_what_becomes_floats(tmp_path: Path) -> None:
    tensors = [("token_embd.weight", (32, 4), Q8_0, 0), ("b", (64, 8), Q8_0, 160), ("c", (3,), F32, 704)]

    header = read_header(file_of(tmp_path / "a.gguf", tensors, data=736))

    blocks = 64 * 8 // 32 * 34
    assert loaded_bytes(header, 2) == 32 * 4 * 2 + blocks + 3 * 2
    assert loaded_bytes(header, 4) == 32 * 4 * 4 + blocks + 3 * 4
    assert workspace_bytes(header, 2) == int(64 * 8 * QUANTISED[Q8_0].workspace)
    assert form(header) == "Q8_0"


def test_what_is_not_needed_of_the_metadata_is_passed_over(tmp_path: Path) -> None:
    entries = [
        text("general.architecture") + struct.pack("<I", 8) + text("t5encoder"),
        text("words") + struct.pack("<IIQ", 9, 8, 3) + text("a") + text("b" * 5000) + text(""),
        text("scores") + struct.pack("<IIQ", 9, 6, 1000) + b"\0" * 4000,
        text("licence") + struct.pack("<I", 8) + text("x" * 5000),
        text("comfy.gguf.orig_shape.a") + struct.pack("<IIQ4i", 9, 5, 4, 2, 2, 4, 4),
        text("general.alignment") + struct.pack("<II", 4, 64),
    ]
    path = file_of(tmp_path / "a.gguf", [("a", (64,), F32, 0), ("b", (1,), F32, 256)], entries, data=512)

    header = read_header(path)

    assert header.metadata == {"general.architecture": "t5encoder", "general.alignment": 64}
    assert header.tensors["a"].original_shape == (2, 2, 4, 4)
    assert header.tensors["a"].start % 64 == 0
    assert header.tensors["b"].original_shape is None


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return text("k") + struct.pack("<IIQ", 9, kind, count) + content


WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda path: file_of(path, begin=b""), "does not begin with GGUF"),
    "an empty file": (lambda path: (path.write_bytes(b"") and path) or path, "does not begin with GGUF"),
    "a pointer of git": (
        lambda path: file_of(path, begin=b"version https://git-lfs"),
        "pointer that git keeps",
    ),
    "an old version": (lambda path: file_of(path, begin=b"GGUF\x01\0\0\0"), "version 1 .* convert it"),
    "the other byte order": (lambda path: file_of(path, begin=b"GGUF\0\0\0\x03"), "other byte order"),
    "no tensors": (lambda path: file_of(path, ()), "lists 0 tensors"),
    "too many tensors": (lambda path: file_of(path, counts=(MAX_TENSORS + 1, 0)), "lists 65537 tensors"),
    "more tensors than there are": (lambda path: file_of(path, counts=(60_000, 0)), "is cut|dimensions|name"),
    "too many entries": (lambda path: file_of(path, counts=(1, HUGE)), "entries"),
    "a long name": (lambda path: file_of(path, entries=[struct.pack("<Q", HUGE)]), "a name .* has"),
    "a name that is no text": (
        lambda path: file_of(path, entries=[struct.pack("<Q", 2) + b"\xff\xff"]),
        "not UTF-8",
    ),
    "a long array": (lambda path: file_of(path, entries=[array(10, HUGE)]), "goes beyond"),
    "a long array of texts": (lambda path: file_of(path, entries=[array(8, HUGE)]), "goes beyond"),
    "a long text in an array": (
        lambda path: file_of(path, entries=[array(8, 1, struct.pack("<Q", HUGE))]),
        "goes beyond",
    ),
    "an array of arrays": (lambda path: file_of(path, entries=[array(9, 1)]), "array of the type 9"),
    "an unknown entry": (
        lambda path: file_of(path, entries=[text("k") + struct.pack("<I", 77)]),
        "unknown type 77",
    ),
    "a strange alignment": (
        lambda path: file_of(path, entries=[text("general.alignment") + struct.pack("<II", 4, 0)]),
        "alignment is 0",
    ),
    "many dimensions": (lambda path: file_of(path, [("a", (1,) * 6, F32, 0)]), "6 dimensions"),
    "no dimension": (lambda path: file_of(path, [("a", (), F32, 0)]), "0 dimensions"),
    "no values": (lambda path: file_of(path, [("a", (0,), F32, 0)]), r"the shape \(0,\)"),
    "huge dimensions": (lambda path: file_of(path, [("a", (HUGE, HUGE), F32, 0)]), "the shape"),
    "half a block": (lambda path: file_of(path, [("a", (48, 2), Q8_0, 0)]), r"shape \(2, 48\)"),
    "an odd offset": (lambda path: file_of(path, [("a", (8,), F32, 4)]), "at the offset 4"),
    "an offset beyond the end": (lambda path: file_of(path, [("a", (8,), F32, HUGE)]), "its tensors end at"),
    "too few bytes": (lambda path: file_of(path, [("a", (65,), F32, 0)]), "is cut: .* fetch it again"),
    "one place for two": (
        lambda path: file_of(path, [("a", (64,), F32, 0), ("b", (8,), F32, 32)]),
        "'a' and 'b' overlap",
    ),
    "one name for two": (
        lambda path: file_of(path, [("a", (8,), F32, 0), ("a", (8,), F32, 32)]),
        "two tensors 'a'",
    ),
    "a type that is not computed with": (
        lambda path: file_of(path, [("a", (256,), 16, 0)]),
        "type IQ2_XXS, .* use a file with types of F32",
    ),
    "an unknown type": (lambda path: file_of(path, [("a", (256,), 999, 0)]), "the type 999"),
    "another shape before": (
        lambda path: file_of(
            path, entries=[text("comfy.gguf.orig_shape.a") + struct.pack("<IIQ2i", 9, 5, 2, 5, 5)]
        ),
        r"was \(5, 5\) before",
    ),
}


@pytest.mark.parametrize(("make", "cause"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_header_is_refused_with_the_cause_and_takes_no_memory(
    tmp_path: Path, make: Callable[[Path], Path], cause: str
) -> None:
    path = make(tmp_path / "file.gguf")
    tracemalloc.start()

    with pytest.raises(ModelFailed, match=rf"GGUF file .*file.gguf cannot be used: .*{cause}"):
        read_header(path)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_every_place_where_a_file_may_be_cut_is_found(tmp_path: Path) -> None:
    entries = [array(8, 2, text("a") + text("b")), text("general.name") + struct.pack("<I", 8) + text("x")]
    path = file_of(tmp_path / "file.gguf", [("a", (64,), F32, 0), ("b", (8, 2), F32, 256)], entries, data=320)
    whole = path.read_bytes()
    assert len(read_header(path).tensors) == 2

    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFailed):
            read_header(path)


def test_a_large_array_takes_no_memory(tmp_path: Path) -> None:
    """The reader of the library makes objects of all elements: 1.4 GiB for these 2 MiB."""
    path = file_of(tmp_path / "file.gguf", entries=[array(0, 2_000_000, b"\0" * 2_000_000)])
    tracemalloc.start()

    header = read_header(path)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(header.tensors) == 1
    assert math.log2(peak) < 20
