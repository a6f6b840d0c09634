"""Jobs while dispatchers and the store are killed at random: accepted, lost, ended twice; time to recover."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from pathlib import Path

import ledger

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.chaos.runner import Chaos, Tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="runs, with seeds 1..N")
    parser.add_argument("--jobs", type=int, default=120, help="per run")
    parser.add_argument("--outage", type=float, default=3.0, help="seconds that the store hangs at a time")
    parser.add_argument("--keep", action="store_true", help="record the figures")
    options = parser.parse_args()
    tallies = []
    for seed in range(1, options.seeds + 1):
        with tempfile.TemporaryDirectory() as folder:
            chaos = Chaos(Path(folder), seed, jobs=options.jobs, hang_s=options.outage)
            tallies.append(asyncio.run(chaos.run()))
        print(tallies[-1], flush=True)
    if options.keep:
        _record(tallies)
    sys.exit(any(tally.broken for tally in tallies))


def _record(tallies: list[Tally]) -> None:
    kills = {kind: sum(tally.kills[kind] for tally in tallies) for kind in tallies[0].kills}
    notes = ", ".join(f"{number} x {kind}" for kind, number in kills.items())
    for name, values in {
        "accepted": [tally.accepted for tally in tallies],
        "lost": [tally.lost for tally in tallies],
        "ended twice": [tally.double for tally in tallies],
        "unreadable": [tally.unreadable for tally in tallies],
    }.items():
        ledger.record(f"chaos: jobs {name}", sum(values), "jobs", n=len(tallies), notes=notes)
    recovery_s = [seconds for tally in tallies for seconds in tally.recovery_s]
    if recovery_s:
        ledger.record(
            "chaos: a client refused by a dead or hanging store is accepted after",
            statistics.median(recovery_s),
            "s",
            spread=f"max {max(recovery_s):.2f}",
            n=len(recovery_s),
            notes=notes,
        )


if __name__ == "__main__":
    main()
