"""Serves a model of real size on a simulated GPU and prints what the GPU had to do.

    python -m tests.device_sim flux --rows 4 --loras 2
    python -m tests.device_sim sdxl --requests 3 --wave loras=0 --wave loras=4 --wave control=canny

Options of a wave hold for all waves; each --wave changes some of them, and without one there is one wave.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import Field, fields, replace
from typing import Any, get_args

from deployments.protocol.request import Exactness
from tests.device_sim.costs import KINDS
from tests.device_sim.models import MODELS
from tests.device_sim.report import Part, as_text, part_of
from tests.device_sim.run import serve
from tests.device_sim.scenario import Scenario, Wave

CHOICES = {"gpu": KINDS, "exact": get_args(Exactness)}


def scenario_of(arguments: list[str]) -> tuple[Scenario, bool]:
    """The scenario that the command line asks for, and whether to print JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.device_sim", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--wave", action="append", default=[], help="changes to the wave: name=value,...")
    own = [field for field in fields(Scenario) if field.name not in ("model", "waves")]
    for field in (*own, *fields(Wave)):
        _add_option(parser, field)
    given = vars(parser.parse_args(arguments))
    wave = Wave(**{field.name: given[field.name] for field in fields(Wave)})
    waves = tuple(_changed(wave, changes) for changes in given["wave"]) or (wave,)
    options = {field.name: given[field.name] for field in own}
    return Scenario(given["model"], **options, waves=waves), given["json"]


def _add_option(parser: argparse.ArgumentParser, field: Field[Any]) -> None:
    option = f"--{field.name.replace('_', '-')}"
    if isinstance(field.default, bool):
        parser.add_argument(option, action=argparse.BooleanOptionalAction, default=field.default)
    else:
        choices = CHOICES.get(field.name)
        parser.add_argument(option, type=_parser_of(field), choices=choices, default=field.default)


def _parser_of(field: Field[Any]) -> Any:
    if field.name == "sizes":
        return _sizes
    return str if field.default is None else type(field.default)


def _changed(wave: Wave, text: str) -> Wave:
    """The wave with changes such as "loras=2,steps=6"."""
    by_name = {field.name: field for field in fields(Wave)}
    changes: dict[str, Any] = {}
    for change in text.split(","):
        name, _, value = change.partition("=")
        field = by_name[name.replace("-", "_")]
        is_flag = isinstance(field.default, bool)
        changes[field.name] = value in ("", "true") if is_flag else _parser_of(field)(value)
    return replace(wave, **changes)


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Widths and heights from a text such as 1024x1024/768x1024."""
    pairs = (size.split("x") for size in text.split("/"))
    return tuple((int(width), int(height)) for width, height in pairs)


def main() -> None:
    scenario, as_json = scenario_of(sys.argv[1:])
    parts: list[Part] = []
    serve(scenario, lambda *measured: parts.append(part_of(*measured)))
    print(json.dumps(parts) if as_json else as_text(parts), flush=True)
    os._exit(0)  # threads of the replica would keep the process


if __name__ == "__main__":
    main()
