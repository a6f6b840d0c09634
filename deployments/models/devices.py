"""Devices by torch's names. As a program: those of this machine, as a JSON list."""

from __future__ import annotations

import json

import torch

from deployments.models.hardware import best_device
from deployments.protocol.errors import ModelUnavailable


def device_called(name: str | None, *, reserves_gpu: bool = False) -> torch.device:
    """The device of this name, of which a GPU becomes the current one; None: the best that there is.

    reserves_gpu: Ray has given this process a GPU, so that the CPU would be a mistake.
    Raises ModelUnavailable naming what is there.
    """
    if name is None:
        best = best_device()
        if reserves_gpu and best.type == "cpu":
            raise ModelUnavailable(
                f"Ray gave this replica a GPU, and torch finds none that works here ({_why_no_gpu()}); "
                "install a driver that fits this torch, or set MODEL_DEVICE=cpu to compute on the CPU"
            )
        return best
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


def _why_no_gpu() -> str:
    """What torch says when it is asked for one."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().partition("\n")[0]
    return "no device is visible"


def _devices() -> list[str]:
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    apple = ["mps"] if torch.backends.mps.is_available() else []
    return [*(f"cuda:{gpu} ({torch.cuda.get_device_name(gpu)})" for gpu in gpus), *apple, "cpu"]


if __name__ == "__main__":
    print(json.dumps(_devices()))
