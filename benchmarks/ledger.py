"""Keeps measured figures: appends to benchmarks/results.jsonl and renders results.md from its newest rows."""

from __future__ import annotations

import ast
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
JSONL = FOLDER / "results.jsonl"
MARKDOWN = FOLDER / "results.md"
HEAD_LINE = 7 * "| --- " + "|"


def record(name: str, value: float, unit: str, *, spread: str = "", n: int = 1, notes: str = "") -> None:
    """Append one figure with machine, commit, command and date, and render results.md again."""
    row = {
        "name": name,
        "value": round(value, 4),
        "unit": unit,
        "spread": spread,
        "n": n,
        "machine": machine(),
        "commit": _commit(),
        "command": " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "notes": notes,
    }
    with JSONL.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{name} = {row['value']} {unit}  {spread}  (n={n}) {notes}", flush=True)
    render()


def render() -> None:
    """Write results.md: the newest row of each name, a table and the plots of each script."""
    newest = {row["name"]: row for row in map(json.loads, JSONL.read_text(encoding="utf-8").splitlines())}
    by_script: dict[Path, list[dict[str, Any]]] = {}
    for row in sorted(newest.values(), key=lambda row: str(row["name"])):
        by_script.setdefault(_script(row["command"]), []).append(row)
    lines = [
        "# Measured figures",
        "",
        "The newest row of each name in `results.jsonl`, by the script that adds it.",
    ]
    for script, rows in sorted(by_script.items()):
        lines += ["", f"## {script.name}", "", _purpose(script), ""]
        lines += [
            f"![{plot.stem}](plots/{plot.name})\n"
            for plot in sorted((FOLDER / "plots").glob("*.svg"))
            if script.stem.startswith(plot.stem)
        ]
        lines += ["| name | value | spread | n | notes | machine | commit, date, command |", HEAD_LINE]
        lines += [
            f"| `{row['name']}` | {row['value']:g} {row['unit']} | {row['spread']} | {row['n']} "
            f"| {row['notes']} | {row['machine']} | {row['commit']}, {row['date']}, `{row['command']}` |"
            for row in rows
        ]
    MARKDOWN.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _script(command: str) -> Path:
    """The file that `python benchmarks/x.py`, `python x.py` or `python -m a.x` runs."""
    words = command.split()
    if words[1] == "-m":
        return FOLDER.parent / (words[2].replace(".", "/") + ".py")
    return FOLDER / Path(words[1]).name


def _purpose(script: Path) -> str:
    """The first paragraph of the script's docstring."""
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def machine() -> str:
    """CPU cores, architecture and GPU of this machine."""
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{os.cpu_count()} cores {platform.machine()}{gpu}"


@cache
def _commit() -> str:
    """Once for all rows of a run: the first one changes a file that git knows."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
