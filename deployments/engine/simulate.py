"""When jobs will start and end if nobody else comes (pure: no torch, no clock)."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

EVENTS = 128  # ends of jobs that are followed one by one; whatever comes later is laid end to end


@dataclass(slots=True)
class SimulatedJob:
    """A job's steps to come. `foresee` counts them down."""

    score: float  # smaller runs earlier
    steps: int
    batch_size: int
    max_batch_size: int  # that a forward of this shape has
    work_s: float  # of the device, for all its steps
    shape: Hashable  # tasks of equal shape share forwards
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
    clock, started = 0.0, 0
    for _ in range(EVENTS):
        while started < len(queued) and len(running) < slots:
            queued[started].starts_s = clock
            insort(running, queued[started], key=_by_score)
            started += 1
        if not running:
            return
        group = _group(running)
        steps = min(job.steps for job in group)
        seen = group[0].shape, sum(job.batch_size for job in group)
        if seen not in known:
            known[seen] = step_s(*seen)
        clock += steps * known[seen]
        for job in group:
            job.steps -= steps
            job.work_s -= job.work_s * steps / (job.steps + steps)
            if not job.steps:
                job.ends_s = clock
        running = [job for job in running if job.steps]
    _lay_end_to_end(running, queued[started:], clock)


def _by_score(job: SimulatedJob) -> float:
    return job.score


def _group(running: Sequence[SimulatedJob]) -> list[SimulatedJob]:
    """The first and those that fit into its forwards."""
    first = running[0]
    group, room = [first], first.max_batch_size - first.batch_size
    for job in running[1:]:
        if job.batch_size <= room and job.shape == first.shape:
            group.append(job)
            room -= job.batch_size
    return group


def _lay_end_to_end(running: Sequence[SimulatedJob], waiting: Sequence[SimulatedJob], clock: float) -> None:
    ends = []
    for job in running:
        clock += job.work_s
        job.ends_s = clock
        ends.append(clock)
    for number, job in enumerate(waiting):
        clock += job.work_s
        job.starts_s = ends[number]
        job.ends_s = clock
        ends.append(clock)
