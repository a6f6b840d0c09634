"""Delay of a job whose process or node dies while it runs, and seconds until nodes are added and removed.

Runs the tests that kill (tests/graph/test_faults.py, test_node_faults.py, test_node_autoscaling.py), which
assert that nothing is lost and no image differs, and keeps the seconds that they report. About ten minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import ledger

ROOT = Path(__file__).parent.parent
TESTS = [f"tests/graph/test_{name}.py" for name in ("faults", "node_faults", "node_autoscaling")]
LATER = "the job ended so much later than undisturbed; leases of 3 s"
NOTES = {
    "recovery_dispatcher_s": f"kill -9 of the only dispatcher: {LATER}",
    "recovery_model_replica_s": f"kill -9 of the only replica, which starts anew: {LATER}",
    "recovery_valkey_s": f"kill -9 of Valkey: {LATER}",
    "recovery_node_s": f"kill -9 of the raylet, a replica starts on another node: {LATER}",
    "recovery_head_up_s": "kill -9 of the GCS, until a new head answers",
    "recovery_head_s": f"kill -9 of the GCS, head started anew: {LATER}",
    "rolling_update_s": "a new config, until no replica of the old one is left, under load",
    "rolling_update_jobs": "accepted meanwhile; all completed",
    "nodes_up_s": "from the first job until replicas run on two new nodes",
    "nodes_jobs_done_s": "until all jobs had completed",
    "nodes_gone_s": "until no GPU node was left",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="record nothing")
    dry = parser.parse_args().dry
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *TESTS, f"--junitxml={report}"]
        command += ["-o", "junit_family=xunit1"]  # the default format has no properties of tests
        code = subprocess.run(command, cwd=ROOT, env=os.environ, check=False).returncode
        figures = {
            each.get("name", ""): each.get("value", "") for each in ElementTree.parse(report).iter("property")
        }
    for name, value in figures.items():
        unit = "s" if name.endswith("_s") else "jobs"
        if dry:
            print(name, value, unit)
        else:
            ledger.record(name, float(value), unit, notes=NOTES[name])
    sys.exit(code)


if __name__ == "__main__":
    main()
