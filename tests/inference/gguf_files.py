"""GGUF files of small modules, quantised here: also in those types that the library gguf only reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from torch import Tensor, nn

TYPES = {"Q8_0": 32, "Q4_0": 32, "Q4_K": 256, "Q6_K": 256, "F16": 1, "BF16": 1}  # with the values of a block
Names = Callable[[str], str]


def write_gguf(
    path: Path,
    module: nn.Module | Mapping[str, Tensor],
    kind: str,
    *,
    architecture: str | None = "flux",
    names: Names = lambda name: name,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """The module's weights: matrices whose rows have whole blocks in this type, others in float32.

    names: in the file, by those in the module.
    """
    writer = GGUFWriter(path, architecture or "")
    if architecture is None:
        writer.kv_data[0].clear()
    state = module.state_dict() if isinstance(module, nn.Module) else module
    for name, tensor in state.items():
        values = tensor.to(dtype).float().numpy()
        if values.ndim == 2 and values.shape[1] % TYPES[kind] == 0:
            of = GGMLQuantizationType[kind]
            data = blocks(values, kind)
            writer.add_tensor(names(name), data, raw_dtype=of)
        else:
            writer.add_tensor(names(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(values: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Rows of blocks of this type."""
    own = {"Q4_K": _q4_k, "Q6_K": _q6_k}
    if kind not in own:
        return quantize(values, GGMLQuantizationType[kind])
    rows, columns = values.shape
    made = own[kind](values.reshape(-1, 256))
    return made.reshape(rows, columns // 256 * made.shape[1])


def _halves(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return values.astype(np.float16).reshape(-1, 1).view(np.uint8)


def _q6_k(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Numbers of 6 bits, a scale of 8 bits for each 16 and one of 16 bits for all."""
    count = len(values)
    largest = np.abs(values.reshape(count, 16, 16)).max(axis=2) / 31
    whole = np.maximum(largest.max(axis=1) / 127, 1e-7).astype(np.float16).astype(np.float32)
    scales = np.clip(np.ceil(largest / whole[:, None]), 1, 127)
    steps = np.repeat(scales * whole[:, None], 16, axis=1)
    numbers = (np.clip(np.round(values / steps), -32, 31) + 32).astype(np.uint8)
    low = (numbers & 15).reshape(count, 2, 2, 64)
    high = (numbers >> 4).reshape(count, 2, 4, 32)
    lows = (low[:, :, 0] | low[:, :, 1] << 4).reshape(count, 128)
    highs = (high << np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]).sum(axis=2, dtype=np.uint8)
    return np.concatenate(
        [lows, highs.reshape(count, 64), scales.astype(np.int8).view(np.uint8), _halves(whole)], axis=1
    )


def _q4_k(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Numbers of 4 bits, a scale and a least value of 6 bits for each 32, and one of 16 bits for all."""
    count = len(values)
    groups = values.reshape(count, 8, 32)
    least = np.maximum(-groups.min(axis=2), 0)
    ranges = np.maximum((groups.max(axis=2) + least) / 15, 1e-6)
    both = (np.maximum(one.max(axis=1) / 63, 1e-7) for one in (ranges, least))
    whole, whole_least = (one.astype(np.float16).astype(np.float32) for one in both)
    scales = np.clip(np.ceil(ranges / whole[:, None]), 1, 63).astype(np.uint8)
    leasts = np.clip(np.round(least / whole_least[:, None]), 0, 63).astype(np.uint8)
    step, below = scales * whole[:, None], leasts * whole_least[:, None]
    numbers = np.clip(np.round((groups + below[:, :, None]) / step[:, :, None]), 0, 15).astype(np.uint8)
    pairs = numbers.reshape(count, 4, 2, 32)
    packed = np.concatenate(
        [
            scales[:, :4] | (scales[:, 4:] >> 4) << 6,
            leasts[:, :4] | (leasts[:, 4:] >> 4) << 6,
            (scales[:, 4:] & 15) | (leasts[:, 4:] & 15) << 4,
        ],
        axis=1,
    )
    lows = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(count, 128)
    return np.concatenate([_halves(whole), _halves(whole_least), packed, lows], axis=1)
