"""Devices by torch's names. As a program, for commands that do without torch, it prints JSON:

    python -m deployments.models.devices list
    python -m deployments.models.devices machine --num-gpus 0.5 --device cuda --alone

The devices of this machine, or what a plan depends on of the device that a replica would have.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import torch

from deployments.models.hardware import best_device, machine_of, memory_bytes
from deployments.protocol.errors import ModelUnavailable


def device_called(name: str | None, *, reserves_gpu: bool = False) -> torch.device:
    """The device of this name, a GPU as this thread's current one; None: the best that there is.

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
    if not number:
        return torch.device(kind)
    torch.cuda.set_device(int(number))
    return torch.device(kind, int(number))  # other threads have a current one of their own


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


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the devices of this machine")
    machine = commands.add_parser("machine", help="what a plan depends on of one of them")
    machine.add_argument("--num-gpus", type=float, default=1.0, help="of the replica")
    machine.add_argument("--device", help="as MODEL_DEVICE; without it the best that there is")
    machine.add_argument("--alone", action="store_true", help="as if no other process used its memory")
    asked = parser.parse_args()
    if asked.command == "list":
        print(json.dumps(_devices()))
        return
    device = device_called(asked.device)
    limit_bytes = memory_bytes(device, asked.num_gpus, alone=asked.alone)
    print(json.dumps(asdict(machine_of(device, limit_bytes))))


if __name__ == "__main__":
    main()
