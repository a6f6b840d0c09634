"""Checkpoints that cannot be used are refused by their header, with the cause and the cure."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deployments.checkpoint_format.contents import check_readable, strange_names
from deployments.checkpoint_format.header import MAX_HEADER_BYTES, read_header
from deployments.protocol.errors import ModelFailed

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_with(path: Path, header: Any, data: bytes = bytes(8)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_names_dtypes_and_shapes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.zeros(4)}, path, {"made": "here"})

    header = read_header(path)

    assert {name: (one.dtype, one.shape) for name, one in header.tensors.items()} == {
        "a": ("BF16", (2, 3)),
        "b": ("F32", (4,)),
    }
    assert header.metadata == {"made": "here"}


@pytest.mark.parametrize(
    ("header", "data", "cause"),
    [
        (b"{ ", bytes(8), "its header is damaged"),
        (b"[1]", bytes(8), "its header is damaged"),
        (b"[" * 100_000, b"", "its header is damaged"),
        ({}, b"", "its header lists 0 tensors"),
        (b'{"a":1,"a":2}', b"", "a name is in it twice"),
        ({"a": ENTRY | {"dtype": "Q4"}}, bytes(8), "a tensor of dtype 'Q4'"),
        ({"a": ENTRY | {"shape": [-2]}}, bytes(8), "its header is damaged"),
        ({"a": ENTRY | {"shape": [True, 2]}}, bytes(8), "its header is damaged"),
        ({"a": ENTRY | {"data_offsets": [0, 4]}}, bytes(8), "its tensor a is not where"),
        ({"a": ENTRY | {"data_offsets": [8, 16]}}, bytes(16), "its tensor a is not where"),
        ({"a": ENTRY, "b": ENTRY}, bytes(8), "its tensor b is not where"),
        ({"a": ENTRY}, bytes(4), "it is cut"),
        ({"a": ENTRY}, bytes(12), "it is longer than its tensors"),
        ({"n" * 501: ENTRY}, bytes(8), "its header lists"),
    ],
)
def test_a_damaged_header_is_refused_with_the_cause(
    tmp_path: Path, header: Any, data: bytes, cause: str
) -> None:
    path = file_with(tmp_path / "model.safetensors", header, data)

    with pytest.raises(ModelFailed, match=cause) as refused:
        read_header(path)

    assert str(path) in refused.value.message
    assert "; " in refused.value.message


@pytest.mark.parametrize(
    ("name", "data", "cause"),
    [
        ("model.ckpt", b"PK\x03\x04" + bytes(30), "it is a pickle"),
        ("model.safetensors", b"\x80\x02}q\x00" + bytes(30), "it is a pickle"),
        ("model.safetensors", b"", "it is no safetensors file"),
        (
            "model.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid",
            "it is no safetensors file",
        ),
        ("model.safetensors", struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "it is no safetensors file"),
        ("model.safetensors", struct.pack("<Q", 1000) + b"{}", "it is cut"),
        ("missing.safetensors", None, "it cannot be read"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(
    tmp_path: Path, name: str, data: bytes | None, cause: str
) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)

    with pytest.raises(ModelFailed, match=cause):
        read_header(path)


@pytest.mark.parametrize(
    ("names", "cause", "cure"),
    [
        (["lora_unet_down.lora_down.weight"], "it is a LoRA", "/api/loras"),
        (["transformer.x.lora_A.weight"], "it is a LoRA", "/api/loras"),
        (["control_model.time_embed.0.weight"], "it is a ControlNet", "controls of a card"),
        (
            ["double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.qkv.scale_weight"],
            "scales",
            "bf16",
        ),
        (["scaled_fp8", "model.diffusion_model.x.weight"], "scales", "bf16"),
        (["x.weight", "x.weight.quant_state.bitsandbytes__nf4"], "another library", "GGUF"),
        (["transformer_blocks.0.qweight"], "another library", "GGUF"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(
    tmp_path: Path, names: list[str], cause: str, cure: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(1) for name in names}, path)

    with pytest.raises(ModelFailed, match=cause) as refused:
        check_readable(read_header(path))

    assert cure in refused.value.message


def test_tensors_of_no_known_part_are_found() -> None:
    names = ["model.diffusion_model.a", "first_stage_model.b", "model_ema.c", "alphas_cumprod", "aesthetic.d"]

    assert list(strange_names(names)) == ["aesthetic.d"]
    assert list(strange_names(["double_blocks.0.a", "b"])) == []
