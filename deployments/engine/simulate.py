"""When jobs will start and end if no other job is submitted (pure: no torch, no clock)."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import attrgetter

MAX_ENDS = 128  # ends of jobs that are simulated one by one; later work is laid end to end

_by_score = attrgetter("score")


@dataclass(slots=True)
class SimulatedJob:
    """A job's remaining steps. `simulate` changes steps, work_s, starts_s and ends_s."""

    score: float  # smaller runs earlier
    steps: int
    rows: int  # of its costliest call
    max_batch_size: int  # rows of a forward of this shape
    work_s: float  # device seconds of all its steps
    shape: Hashable  # jobs of equal shape share forwards
    starts_s: float = 0.0
    ends_s: float = 0.0


def simulate(
    active: Sequence[SimulatedJob],
    queued: Sequence[SimulatedJob],
    slots: int,
    step_s: Callable[[Hashable, int], float],
) -> None:
    """Set starts_s and ends_s, seconds from now. `queued` start in this order, when a slot is free.

    step_s: seconds of one step by shape and rows.
    """
    running = sorted((job for job in active if job.steps > 0), key=_by_score)
    known: dict[tuple[Hashable, int], float] = {}
    clock_s, started = 0.0, 0
    for _ in range(MAX_ENDS):
        while started < len(queued) and len(running) < slots:
            queued[started].starts_s = clock_s
            insort(running, queued[started], key=_by_score)
            started += 1
        if not running:
            return
        batch = _batch(running)
        steps = min(job.steps for job in batch)
        forward = batch[0].shape, sum(job.rows for job in batch)
        if forward not in known:
            known[forward] = step_s(*forward)
        clock_s += steps * known[forward]
        for job in batch:
            job.steps -= steps
            job.work_s -= job.work_s * steps / (job.steps + steps)
            if not job.steps:
                job.ends_s = clock_s
        running = [job for job in running if job.steps]
    _lay_end_to_end(running, queued[started:], clock_s)


def _batch(running: Sequence[SimulatedJob]) -> list[SimulatedJob]:
    """The first job and those that fit into its forwards."""
    first = running[0]
    batch, free = [first], first.max_batch_size - first.rows
    for job in running[1:]:
        if job.rows <= free and job.shape == first.shape:
            batch.append(job)
            free -= job.rows
    return batch


def _lay_end_to_end(running: Sequence[SimulatedJob], waiting: Sequence[SimulatedJob], clock_s: float) -> None:
    """Let the jobs run one after the other; each waiting one starts when a slot is free."""
    ends_s = []
    for job in running:
        clock_s += job.work_s
        job.ends_s = clock_s
        ends_s.append(clock_s)
    for number, job in enumerate(waiting):
        clock_s += job.work_s
        job.starts_s = ends_s[number]
        job.ends_s = clock_s
        ends_s.append(clock_s)
