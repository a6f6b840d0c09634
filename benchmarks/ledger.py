"""Where measured figures are kept: benchmarks/results.jsonl, and results.md rendered from its newest rows."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

FOLDER = Path(__file__).parent
JSONL = FOLDER / "results.jsonl"
MARKDOWN = FOLDER / "results.md"


def record(name: str, value: float, unit: str, *, spread: str = "", n: int = 1, notes: str = "") -> None:
    """Append one figure, with machine, commit, command and date, and render results.md anew."""
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
    """results.md: the newest row of each name, as a table."""
    newest = {row["name"]: row for row in map(json.loads, JSONL.read_text(encoding="utf-8").splitlines())}
    lines = [
        "# Measured figures",
        "",
        "The newest row of each name in `results.jsonl`; every script of this folder adds rows.",
        "",
        "| name | value | spread | n | machine | commit | command | date | notes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| `{row['name']}` | {row['value']:g} {row['unit']} | {row['spread']} | {row['n']} "
        f"| {row['machine']} | {row['commit']} | `{row['command']}` | {row['date']} | {row['notes']} |"
        for row in sorted(newest.values(), key=lambda row: str(row["name"]))
    ]
    MARKDOWN.write_text("\n".join(lines) + "\n", encoding="utf-8")


def machine() -> str:
    """CPU cores, architecture and GPU of this machine, in a few words."""
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{os.cpu_count()} cores {platform.machine()}{gpu}"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
