"""The values of a LoRA file's tensors, read chunk by chunk: whether they are numbers, zero, or absurd.

Loads no torch. numpy has no bfloat16 and no 8-bit floats: their bits are widened here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from deployments.lora_format.header import TensorEntry

CHUNK_BYTES = 4 * 2**20
_NUMPY_TYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "I16": "<i2",
                "I8": "<i1", "U8": "<u1"}  # fmt: skip
_SAFE = (1e-12, 1e12)  # magnitudes whose squares neither vanish nor overflow in float32, added up
ReadBytes = Callable[[int, int], bytes | memoryview]  # of the tensors, from and to


@dataclass(frozen=True, slots=True)
class TensorValues:
    """What the values of one tensor are."""

    largest: float  # magnitude; NaN or infinite where a value is
    rms: float  # root of the mean square; infinite where it overflows
    first: float  # an alpha's value

    @property
    def is_zero(self) -> bool:
        """Whether all values are 0."""
        return self.largest == 0


def tensor_values(entry: TensorEntry, read: ReadBytes) -> TensorValues:
    """Read all values of a tensor. One without values counts as zero."""
    largest, squares, first, count = 0.0, 0.0, math.nan, 0
    for start in range(entry.start, entry.end, CHUNK_BYTES):
        values = decoded(entry.dtype, read(start, min(entry.end, start + CHUNK_BYTES)))
        if not count:
            first = float(values[0])
        high, low = float(values.max()), float(values.min())  # NaN where a value is
        magnitude = high if math.isnan(high) else max(high, -low)
        if not math.isfinite(magnitude):
            return TensorValues(magnitude, math.inf, first)
        largest = max(largest, magnitude)
        squares += _sum_of_squares(values, magnitude)
        count += values.size
    return TensorValues(largest, math.sqrt(squares / count) if count else 0.0, first)


def _sum_of_squares(values: NDArray[np.floating], magnitude: float) -> float:
    """magnitude: of the largest value."""
    if magnitude == 0 or _SAFE[0] < magnitude < _SAFE[1]:
        return float(np.dot(values, values))
    scaled = values / magnitude
    return float(np.dot(scaled, scaled)) * magnitude * magnitude


def is_zero(dtype: str, data: bytes | memoryview) -> bool:
    """Whether all values in these bytes are 0. dtype: of the header."""
    return not np.any(decoded(dtype, data))


def decoded(dtype: str, data: bytes | memoryview) -> NDArray[np.floating]:
    """Values of a dtype of the header as float32, or float64 where float32 does not hold them."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << np.uint32(16)).view(np.float32)
    if dtype in ("F8_E4M3", "F8_E5M2"):
        return _eight_bit_values(dtype)[np.frombuffer(data, np.uint8)]
    values = np.frombuffer(data, _NUMPY_TYPES[dtype])
    return values.astype(np.float64 if values.itemsize == 8 else np.float32, copy=False)


@cache
def _eight_bit_values(dtype: str) -> NDArray[np.float32]:
    """The value of each of the 256 bit patterns (Micikevicius et al., arXiv 2209.05433)."""
    fraction_bits, bias = (3, 7) if dtype == "F8_E4M3" else (2, 15)
    values = []
    for bits in range(256):
        exponent = (bits & 0x7F) >> fraction_bits
        fraction = (bits & ((1 << fraction_bits) - 1)) / (1 << fraction_bits)
        value = math.ldexp(1 + fraction, exponent - bias) if exponent else math.ldexp(fraction, 1 - bias)
        if dtype == "F8_E4M3" and bits & 0x7F == 0x7F:
            value = math.nan
        if dtype == "F8_E5M2" and exponent == 31:
            value = math.nan if fraction else math.inf
        values.append(-value if bits & 0x80 else value)
    return np.array(values, np.float32)
