"""Runs `python -m tests.device_sim` in a process of its own and returns its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.patience import patience

ROOT = Path(__file__).parents[2]


def simulate(model: str, *options: str, quiet_s: float = 60.0) -> dict[str, Any]:
    """The report of one scenario. options: of the command; quiet_s: what it takes on a quiet machine.

    Fakes and patches of torch stay in the other process. Raises AssertionError with what it printed when
    it fails.
    """
    command = [sys.executable, "-m", "tests.device_sim", model, "--json", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=patience(quiet_s),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report
