"""When jobs will start and end if nobody else comes (pure: no torch, no clock)."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

EVENTS = 128  # ends of jobs that are followed one by one; whatever comes later is laid end to end


@dataclass(slots=True)
class Task:
    """A job's steps to come. `foresee` counts them down."""

    score: float  # smaller runs earlier
    steps: int
    rows: int
    most_rows: int  # that a forward of this shape has
    work_s: float  # of the device, for all its steps
    shape: Hashable  # tasks of equal shape share forwards
    starts_s: float = 0.0
    ends_s: float = 0.0


def foresee(
    active: Sequence[Task], queued: Sequence[Task], slots: int, step_s: Callable[[Hashable, int], float]
) -> None:
    """Set starts_s and ends_s, seconds from now. `queued` start in this order, when a slot is free.

    step_s: seconds of one step by shape and rows.
    """
    running = sorted((task for task in active if task.steps > 0), key=_by_score)
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
        steps = min(task.steps for task in group)
        seen = group[0].shape, sum(task.rows for task in group)
        if seen not in known:
            known[seen] = step_s(*seen)
        clock += steps * known[seen]
        for task in group:
            task.steps -= steps
            task.work_s -= task.work_s * steps / (task.steps + steps)
            if not task.steps:
                task.ends_s = clock
        running = [task for task in running if task.steps]
    _lay_end_to_end(running, queued[started:], clock)


def _by_score(task: Task) -> float:
    return task.score


def _group(running: Sequence[Task]) -> list[Task]:
    """The first and those that fit into its forwards."""
    first = running[0]
    group, room = [first], first.most_rows - first.rows
    for task in running[1:]:
        if task.rows <= room and task.shape == first.shape:
            group.append(task)
            room -= task.rows
    return group


def _lay_end_to_end(running: Sequence[Task], waiting: Sequence[Task], clock: float) -> None:
    ends = []
    for task in running:
        clock += task.work_s
        task.ends_s = clock
        ends.append(clock)
    for number, task in enumerate(waiting):
        clock += task.work_s
        task.starts_s = ends[number]
        task.ends_s = clock
        ends.append(clock)
