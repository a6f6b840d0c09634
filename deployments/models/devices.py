"""Devices by torch's names. As a program: those of this machine, as a JSON list."""

from __future__ import annotations

import json

import torch

from deployments.models.hardware import best_device
from deployments.protocol.errors import ModelUnavailable


def device_called(name: str | None) -> torch.device:
    """The device of this name, of which a GPU becomes the current one; None: the best that there is.

    Raises ModelUnavailable naming what is there.
    """
    if name is None:
        return best_device()
    kind, _, number = name.partition(":")
    there = [*_devices()]
    if not any(
        one == name or one.startswith(f"{name} ") or (not number and one.startswith(f"{kind}:"))
        for one in there
    ):
        hint = "; Ray gives each replica its GPU, so write MODEL_DEVICE=cuda" if number else ""
        raise ModelUnavailable(f"MODEL_DEVICE is {name}, and there is {', '.join(there)}{hint}")
    if number:
        torch.cuda.set_device(int(number))
    return torch.device(kind)


def _devices() -> list[str]:
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    apple = ["mps"] if torch.backends.mps.is_available() else []
    return [*(f"cuda:{gpu} ({torch.cuda.get_device_name(gpu)})" for gpu in gpus), *apple, "cpu"]


if __name__ == "__main__":
    print(json.dumps(_devices()))
