"""The GPUs that a process sees, as Ray gives them to replicas: for processes that are started without Ray."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

AMD_DRIVER = Path("/dev/kfd")


def as_replica(
    model_device: str | None, num_gpus: float, environment: Mapping[str, str] = os.environ
) -> tuple[str | None, dict[str, str]]:
    """The device of a replica as it calls it, and the variables with which a process sees no other GPU.

    model_device: the setting MODEL_DEVICE. num_gpus: of the card; without one it sees none.
    """
    is_gpu = model_device is None or model_device.startswith("cuda")
    if not num_gpus:
        return None if is_gpu else model_device, {_variable(): ""}
    kind, _, number = (model_device or "").partition(":")
    if kind != "cuda" or not number:
        return model_device, {}
    return "cuda", only_gpu(int(number), environment)


def only_gpu(number: int, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variable with which a process sees only this GPU of those that this process sees. Where there are
    not so many, it sees none."""
    name = _variable()
    visible = environment.get(name)
    seen = [gpu.strip() for gpu in visible.split(",")] if visible else None
    if seen is None:
        return {name: str(number)}
    return {name: seen[number] if number < len(seen) else ""}


def _variable() -> str:
    return "HIP_VISIBLE_DEVICES" if AMD_DRIVER.exists() else "CUDA_VISIBLE_DEVICES"
