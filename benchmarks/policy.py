"""The step scheduler compared with other policies on a virtual clock, by published step times.

The plot needs the extra `bench` (matplotlib).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path

import ledger

from deployments.engine.scheduled_job import ParkedCall, ScheduledJob
from deployments.engine.step_scheduler import StepScheduler

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.inference.engine.simulation import (
    MIXED,
    SATURATED,
    UNSATURATED,
    Curve,
    Policy,
    arrivals,
    latencies,
    mean_latency,
    mean_steps,
    p95_latency,
    run,
)

TABLES = {"512 px": UNSATURATED, "1024 px": SATURATED}
LOADS = (0.5, 0.8, 0.9, 1.5, 2.5)  # times what one request after another can do
UNIFORM = {20: 1.0}
PLOT = Path(__file__).parent / "plots" / "policy.svg"
NOTE = "virtual clock over a published table of H200 step times, not a run on a GPU"


class FirstCome:
    """Step-level: waiting calls, oldest first, up to `rows`."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def pick(self, waiting: Sequence[ParkedCall], now: float) -> list[int]:
        return sorted(range(len(waiting)), key=lambda i: waiting[i].order)[: self._rows]

    def record_forward(
        self, key: Hashable, rows: int, seconds: float, jobs: Sequence[ScheduledJob], now: float
    ) -> None:
        """Learns nothing."""

    def next_job(self, queued: Sequence[ScheduledJob], active: Sequence[ScheduledJob], now: float) -> int:
        return 0


class RequestLevel(FirstCome):
    """A batch of equal steps starts together and runs to its end before the next one starts."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self._batch: set[ScheduledJob] = set()

    def pick(self, waiting: Sequence[ParkedCall], now: float) -> list[int]:
        jobs = [call.job for call in waiting if call.job is not None]
        running = [i for i, job in enumerate(jobs) if job in self._batch]
        if not running:
            first = min(jobs, key=lambda job: job.submitted_at)
            running = [i for i, job in enumerate(jobs) if job.steps == first.steps][: self._rows]
            self._batch = {jobs[i] for i in running}
        return running


POLICIES: dict[str, Callable[[], Policy]] = {
    "one after another": lambda: RequestLevel(1),
    "request-level": lambda: RequestLevel(8),
    "step-level FCFS": lambda: FirstCome(8),
    "Weft": lambda: StepScheduler(8),
}


def finished(policy: str, curve: Curve, load: float, steps: dict[int, float], count: int, seed: int) -> dict:
    """When each job finished; the load is relative to one request after another."""
    per_second = load / curve(1) / mean_steps(steps)
    return run(POLICIES[policy](), arrivals(count, per_second, seed, steps), curve)


def ratios(
    figure: Callable[[dict], float], policy: str, steps: dict[int, float], count: int, seeds: int
) -> list[float]:
    """Weft's figure over that of `policy`, with the 1024 px table at 0.8 load, by seed."""
    return [
        figure(finished("Weft", SATURATED, 0.8, steps, count, seed))
        / figure(finished(policy, SATURATED, 0.8, steps, count, seed))
        for seed in range(seeds)
    ]


def throughput_ratios() -> list[float]:
    """Rows per second of a full queue over those of the best fixed batch, both tables."""
    found = []
    for curve in TABLES.values():
        jobs = [ScheduledJob(user=str(n), steps=20, shape="square") for n in range(400)]
        ours = 400 * 20 / max(run(StepScheduler(8), jobs, curve).values())
        found.append(ours / max(rows / curve(rows) for rows in range(1, 9)))
    return found


def rows_of_the_table(count: int, seeds: int) -> Iterator[tuple[str, float, str, float, float, float]]:
    """Table, load, policy, then the mean, the median and the 95th percentile in seconds."""
    for table, curve in TABLES.items():
        for load in LOADS:
            for policy in POLICIES:
                waits = [
                    wait
                    for seed in range(seeds)
                    for wait in latencies(finished(policy, curve, load, MIXED, count, seed))
                ]
                cuts = statistics.quantiles(waits, n=20)
                yield table, load, policy, statistics.mean(waits), cuts[9], cuts[18]


def draw(rows: Sequence[tuple[str, float, str, float, float, float]]) -> None:
    """Plot mean and 95th percentile over the load, one column per table."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "policy"  # equal figures, equal file
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), sharex=True)
    for column, table in enumerate(TABLES):
        for line, (place, label) in enumerate(((3, "mean"), (5, "95th percentile"))):
            axis = axes[line][column]
            for policy in POLICIES:
                values = [row[place] for row in rows if row[0] == table and row[2] == policy]
                axis.plot(LOADS, values, marker="o", label=policy, linewidth=3 if policy == "Weft" else 1.5)
            axis.set_yscale("log")
            axis.set_title(f"{table}, {label}")
            axis.set_ylabel("seconds from arrival to end")
            axis.grid(True, which="both", alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("load (1: one request after another is just busy)")
    axes[0][0].legend()
    figure.suptitle("Virtual clock, Poisson arrivals, 4 to 50 steps, published H200 step times")
    figure.tight_layout()
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})


def record(
    name: str, values: list[float], worst: Callable[[list[float]], float], note: str, dry: bool
) -> None:
    spread = f"{min(values):.3f}-{max(values):.3f}"
    print(name, round(worst(values), 3), spread, note)
    if not dry:
        ledger.record(
            name, worst(values), "ratio", spread=spread, n=len(values), notes="; ".join((NOTE, note))
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="neither record nor draw")
    options = parser.parse_args()
    print("| table | load | policy | mean s | p50 s | p95 s |\n| --- | --- | --- | --- | --- | --- |")
    rows = []
    for row in rows_of_the_table(options.requests, options.seeds):
        rows.append(row)
        table, load, policy, mean, median, p95 = row
        print(f"| {table} | {load} | {policy} | {mean:.2f} | {median:.2f} | {p95:.2f} |", flush=True)
    if not options.dry:
        draw(rows)
    for kind, steps in (("mixed", MIXED), ("uniform", UNIFORM)):
        for name, figure in (("mean", mean_latency), ("p95", p95_latency)):
            serial, shared = (
                ratios(figure, policy, steps, options.requests, options.seeds)
                for policy in ("one after another", "step-level FCFS")
            )
            note = (
                "1024 px table at 0.8 load against one after another, the stronger baseline; "
                f"against step-level first come, first served in forwards of 8: {statistics.mean(shared):.3f}"
            )
            record(f"saturated_{name}_vs_fcfs_{kind}", serial, statistics.mean, note, options.dry)
    record("throughput_vs_best_static", throughput_ratios(), min, "full queue, both tables", options.dry)


if __name__ == "__main__":
    main()
