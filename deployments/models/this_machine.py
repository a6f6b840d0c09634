"""Prints this process's device as JSON, for commands that do without torch: `python -m` with `num_gpus`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from deployments.models.hardware import best_device, machine_of, memory_bytes


def main() -> None:
    device = best_device()
    print(json.dumps(asdict(machine_of(device, memory_bytes(device, float(sys.argv[1]))))))


if __name__ == "__main__":
    main()
