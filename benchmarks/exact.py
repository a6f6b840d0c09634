"""Random schedules of mixed requests, each compared with the requests alone: number run, number failed.

Runs tests/inference/engine/test_exactness.py, which asserts; rows `exact_schedules` and `exact_failures`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import ledger

ROOT = Path(__file__).parent.parent
NOTE = (
    "float64, float32 and bfloat16, FLUX, SDXL and Stable Diffusion with ControlNets; Stable Diffusion, SDXL,"
    " Wan and LTX with guidance, LoRAs of two ranks and previews; strict and by default, no bit"
    " may differ in proven batch sizes"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "tests/inference/engine/test_exactness.py",
            f"--junitxml={report}",
        ]
        command += ["--timeout=0", "--session-timeout=86400"]  # limits of the suite
        if options.processes > 1:
            command += ["--numprocesses", str(options.processes), "--dist", "load"]
        env = os.environ | {"WEFT_EXACT_SCHEDULES": str(options.schedules)}
        code = subprocess.run(command, cwd=ROOT, env=env, check=False).returncode
        suite = next(ElementTree.parse(report).iter("testsuite"))
    failures = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    note = f"{NOTE}; {time.monotonic() - began:.0f} s"
    ledger.record("exact_schedules", options.schedules, "schedules", n=options.schedules, notes=note)
    ledger.record("exact_failures", failures, "tests", n=int(suite.get("tests", 0)), notes=note)
    sys.exit(code)


if __name__ == "__main__":
    main()
