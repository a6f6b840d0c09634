"""Prints this process's device as JSON, for commands that do without torch: `python -m` with `num_gpus`, and
`alone` for its memory as if no other process used it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from deployments.models.hardware import best_device, machine_of, memory_bytes


def main() -> None:
    device = best_device()
    limit_bytes = memory_bytes(device, float(sys.argv[1]), alone="alone" in sys.argv[2:])
    print(json.dumps(asdict(machine_of(device, limit_bytes))))


if __name__ == "__main__":
    main()
