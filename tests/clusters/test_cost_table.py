"""The cost table of docs/operations.md is what the counted operations of our models give."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deployments.protocol.card import load_cards

ROOT = Path(__file__).parents[2]
COUNTED = {"sdxl-base-1.0": "sdxl", "flux.1-schnell": "flux", "flux.1-dev": "flux"}
ROWS = {"sdxl-base-1.0": 2}  # of one picture in a forward: with and without the prompt


def teraflops(family: str) -> float:
    """Of one row in one step, as benchmarks/results.md has it."""
    results = (ROOT / "benchmarks/results.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"`sim_tflop\.{family}` \| ([\d.]+) TFLOP per row", results)
    return float(found)


def table() -> list[dict[str, str]]:
    """The rows of the table, by the titles of its columns."""
    section = (ROOT / "docs/operations.md").read_text(encoding="utf-8").partition("## What it costs")[2]
    lines = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("|")]
    titles, _, *rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(titles, row, strict=True)) for row in rows]


@pytest.mark.parametrize("row", table(), ids=lambda row: str(row["GPU"]))
def test_hours_of_a_gpu_are_those_of_the_counted_operations(row: dict[str, str]) -> None:
    cards = load_cards(ROOT / "configs/models")
    reached = float(row["TFLOP/s reached"])
    said = {model: float(row[model]) for model in COUNTED if row[model] != "—"}

    hours = {
        model: 1000
        * cards[model].steps.default
        * ROWS.get(model, 1)
        * teraflops(COUNTED[model])
        / reached
        / 3600
        for model in said
    }

    assert said == pytest.approx(hours, abs=0.006)
    assert said


def test_the_nodes_are_those_of_the_cluster_files() -> None:
    files = [(ROOT / file).read_text() for file in ("cluster.yaml", "configs/clusters/gcp.yaml")]

    assert {row["GPU"] for row in table()} == {"A10G", "L4", "L40S", "A100", "H100"}
    for row in table():
        name = row["node"]
        assert any(f"InstanceType: {name}\n" in file or f"machineType: {name}\n" in file for file in files)
