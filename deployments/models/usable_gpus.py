"""Prints the GPUs that torch can compute on here as JSON, for a check of the node: `python -m`."""

from __future__ import annotations

import json

import torch


def usable_gpus() -> tuple[list[str], str]:
    """Names of the GPUs that return a right sum, and why the first other one does not; empty: all do."""
    if not torch.cuda.is_available():
        return [], "torch finds no GPU: its build is for CPUs, or the driver is missing or too old"
    names: list[str] = []
    for index in range(torch.cuda.device_count()):
        try:
            total = float(torch.ones(1024, device=f"cuda:{index}").sum())
        except RuntimeError as error:
            return names, str(error).strip().partition("\n")[0]
        if total != 1024:
            return names, f"cuda:{index} adds 1024 ones to {total}"
        names.append(torch.cuda.get_device_name(index))
    return names, ""


if __name__ == "__main__":
    print(json.dumps(usable_gpus()))
