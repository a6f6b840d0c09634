"""Jobs while dispatchers and the store are killed and paused at random: accepted, lost, ended twice, and the
seconds until each of these recovered.

Five runs of 200 jobs take about four minutes. Fails when a job was lost, ended twice or cannot be read.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from pathlib import Path

import ledger

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.chaos.runner import LEASE_S, ZOMBIE_S, Chaos, ChaosReport

MEANING = {
    "worker": f"from kill -9 of a dispatcher until its jobs run elsewhere; leases of {LEASE_S} s",
    "zombie": f"the same of one that is stopped for {ZOMBIE_S} s, and comes back",
    "store": "from kill -9 of Valkey until it answers, everything still there",
    "hang": "the same of one that is stopped for as long as --outage says",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="runs, with seeds 1..N")
    parser.add_argument("--jobs", type=int, default=200, help="per run")
    parser.add_argument("--outage", type=float, default=3.0, help="seconds that the store hangs at a time")
    parser.add_argument("--keep", action="store_true", help="record the figures")
    options = parser.parse_args()
    reports = []
    for seed in range(1, options.seeds + 1):
        with tempfile.TemporaryDirectory() as folder:
            chaos = Chaos(Path(folder), seed, jobs=options.jobs, hang_s=options.outage)
            reports.append(asyncio.run(chaos.run()))
        print(reports[-1], flush=True)
    _report(reports, options.keep)
    sys.exit(any(report.broken for report in reports))


def _report(reports: list[ChaosReport], keep: bool) -> None:
    """Print one row per figure; record it if `keep`."""
    kills = {kind: sum(report.kills[kind] for report in reports) for kind in reports[0].kills}
    notes = ", ".join(f"{number} x {kind}" for kind, number in kills.items())
    for name, total in {
        "chaos_accepted": sum(report.accepted for report in reports),
        "chaos_lost": sum(report.lost for report in reports),
        "chaos_double": sum(report.double for report in reports),
        "chaos_unreadable": sum(report.unreadable for report in reports),
    }.items():
        _row(keep, name, [float(total)], "jobs", len(reports), notes)
    for kind in kills:
        seconds = [second for report in reports for second in report.recovery_s.get(kind, [])]
        if seconds:
            _row(keep, f"chaos_recovery_{kind}_s", seconds, "s", len(seconds), MEANING[kind])


def _row(keep: bool, name: str, values: list[float], unit: str, n: int, notes: str) -> None:
    value, spread = statistics.median(values), f"max {max(values):.2f}" if len(values) > 1 else ""
    if keep:
        ledger.record(name, value, unit, spread=spread, n=n, notes=notes)
    else:
        print(f"{name} = {value:.3g} {unit}  {spread}  (n={n}) {notes}")


if __name__ == "__main__":
    main()
