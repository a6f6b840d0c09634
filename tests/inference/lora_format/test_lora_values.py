"""The values of a file are read as torch reads them, in every dtype, chunk by chunk and without torch."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from deployments.lora_format import values
from deployments.lora_format.header import DTYPE_BYTES, SIZE_BYTES, TensorEntry, read_header
from deployments.lora_format.values import TensorValues, decoded, is_zero, tensor_values

ROOT = Path(__file__).parents[3]
DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def read(tensor: torch.Tensor) -> tuple[TensorEntry, TensorValues]:
    file = save({"x": tensor})
    header = read_header(file)
    data = file[SIZE_BYTES + header.size_bytes :]
    entry = header.tensors["x"]
    return entry, tensor_values(entry, lambda start, end: data[start:end])


def test_every_dtype_of_the_header_is_known_here() -> None:
    assert DTYPES.keys() == DTYPE_BYTES.keys()


@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2"])
def test_all_8_bit_floats_are_those_of_torch(name: str) -> None:
    bits = torch.arange(256, dtype=torch.uint8)

    own = torch.from_numpy(decoded(name, bytes(range(256))).copy())

    torch.testing.assert_close(own, bits.view(DTYPES[name]).float(), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("name", DTYPES)
def test_largest_mean_and_first_are_those_of_the_tensor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "CHUNK_BYTES", 64)
    tensor = (10 * torch.randn(31, 7, generator=torch.Generator().manual_seed(0))).abs().to(DTYPES[name])

    entry, found = read(tensor)

    expected = tensor.double()
    assert entry.dtype == name
    assert found.largest == float(expected.max())
    assert found.first == float(expected.flatten()[0])
    assert found.rms == pytest.approx(float(expected.square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["F16", "BF16", "F32", "F64", "F8_E5M2"])
def test_a_value_that_is_no_number_is_found_in_any_chunk(
    name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "CHUNK_BYTES", 64)
    tensor = torch.ones(300)
    tensor[250] = value

    _, found = read(tensor.to(DTYPES[name]))

    assert not math.isfinite(found.largest)


def test_huge_and_tiny_values_neither_overflow_nor_vanish() -> None:
    assert read(torch.full((9,), 3e38))[1].rms == pytest.approx(3e38, rel=1e-5)
    assert not read(torch.full((9,), 1e-45))[1].is_zero


def test_zero_and_minus_zero_are_zero() -> None:
    tensor = torch.tensor([0.0, -0.0])

    assert read(tensor)[1].is_zero
    assert is_zero("F32", bytes(tensor.numpy().data))
    assert not is_zero("F32", b"\1" + bytes(7))


def test_reading_values_loads_no_torch() -> None:
    code = (
        "import sys, deployments.lora_format.file_info, deployments.lora_format.placement; "
        "sys.exit('torch' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
