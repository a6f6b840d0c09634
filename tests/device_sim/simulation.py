"""Runs the simulated device in a process of its own, so that its patches of torch reach no other test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.device_sim.guard import compiler
from tests.patience import patience

ROOT = Path(__file__).parents[2]

needs_compiler = pytest.mark.skipif(compiler() is None, reason="the simulated device needs g++")


def simulate(model: str, *options: str, quiet_s: float = 60.0) -> list[dict[str, Any]]:
    """The parts of a run of `python -m tests.device_sim`: loading, then its waves; see report.py.

    quiet_s: what it takes on a quiet machine. Raises AssertionError with what it printed when it fails.
    """
    parts: list[dict[str, Any]] = run_module("tests.device_sim", model, "--json", *options, quiet_s=quiet_s)
    return parts


def run_module(module: str, *arguments: str, quiet_s: float = 10.0) -> Any:
    """What the module prints as JSON in its last line."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=patience(quiet_s),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])
