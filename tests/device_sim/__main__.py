"""Runs one scenario and prints its report: python -m tests.device_sim flux --rows 4 --loras 2."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import MISSING, fields
from typing import Any

from tests.device_sim.costs import KINDS
from tests.device_sim.models import CARDS
from tests.device_sim.report import as_text, report
from tests.device_sim.run import Scenario, serve


def scenario_of(arguments: list[str]) -> tuple[Scenario, bool]:
    """The scenario that the command line asks for, and whether to print JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.device_sim", description=__doc__)
    parser.add_argument("model", choices=CARDS)
    parser.add_argument("--gpu", choices=KINDS, default="a100")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    for field in fields(Scenario):
        if field.name in ("model", "gpu"):
            continue
        option, default = f"--{field.name.replace('_', '-')}", field.default
        if default is MISSING:
            continue
        if isinstance(default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=default)
        elif field.name == "sizes":
            parser.add_argument(option, type=_sizes, default=(), help="such as 1024x1024,768x1024")
        else:
            parser.add_argument(option, type=str if default is None else type(default), default=default)
    given: dict[str, Any] = vars(parser.parse_args(arguments))
    as_json = given.pop("json")
    return Scenario(**given), as_json


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    pairs = (size.split("x") for size in text.split(","))
    return tuple((int(width), int(height)) for width, height in pairs)


def main() -> None:
    scenario, as_json = scenario_of(sys.argv[1:])
    began = time.monotonic()
    data = report(serve(scenario))
    data["wall_s"] = time.monotonic() - began
    print(json.dumps(data) if as_json else as_text(data), flush=True)
    os._exit(0)  # threads of the replica would keep the process


if __name__ == "__main__":
    main()
