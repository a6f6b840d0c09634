"""One device on a virtual clock: jobs arrive, the scheduler picks, a forward takes what a table says."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

from deployments.engine.step_scheduler import Job, Waiting

Curve = Callable[[int], float]  # rows -> seconds


class Policy(Protocol):
    def pick(self, waiting: Sequence[Waiting], now: float) -> list[int]: ...
    def ran(self, key: Hashable, rows: int, seconds: float, jobs: Sequence[Job], now: float) -> None: ...
    def next_job(self, queued: Sequence[Job], active: Sequence[Job], now: float) -> int: ...


def curve(*points: tuple[int, float]) -> Curve:
    """Straight lines between (rows, seconds); beyond the last one its line goes on."""

    def seconds(rows: int) -> float:
        for (low, fast), (high, slow) in pairwise(points):
            if rows <= high or high == points[-1][0]:
                return fast + (rows - low) * (slow - fast) / (high - low)
        return points[0][1] * rows

    return seconds


UNSATURATED = curve((1, 0.167), (4, 0.240), (8, 0.425))  # 512 px, published for an H200
SATURATED = curve((1, 0.243), (2, 0.474), (3, 0.711))  # 1024 px
MIXED = {4: 0.3, 8: 0.2, 20: 0.25, 28: 0.15, 50: 0.1}


def mean_steps(steps: Mapping[int, float]) -> float:
    return sum(number * share for number, share in steps.items())


def arrivals(
    count: int,
    per_second: float,
    seed: int,
    steps: Mapping[int, float] = MIXED,
    shapes: Sequence[Hashable] = ("square",),
) -> list[Job]:
    """Poisson arrivals, each of another user; every shape is as likely."""
    chance = random.Random(seed)
    now, jobs = 0.0, []
    for number in range(count):
        now += chance.expovariate(per_second)
        planned = chance.choices(list(steps), list(steps.values()))[0]
        shape = chance.choice(shapes) if len(shapes) > 1 else shapes[0]
        jobs.append(Job(user=f"user {number}", submitted_at=now, steps=planned, shape=shape))
    return jobs


def run(
    policy: Policy, jobs: Sequence[Job], seconds: Curve | Mapping[Hashable, Curve], *, slots: int = 10**9
) -> dict[Job, float]:
    """When each job was finished, in the order of finishing. `slots` of them run at once.

    seconds: of a forward; or by shape, where only equal shapes share forwards.
    """
    coming = sorted(jobs, key=lambda job: job.submitted_at)
    now, order, arrived, active = 0.0, 0, 0, 0
    queued: list[Job] = []
    waiting: list[Waiting] = []
    finished: dict[Job, float] = {}
    while len(finished) < len(jobs):
        if not waiting and not queued:
            now = max(now, coming[arrived].submitted_at)
        while arrived < len(coming) and coming[arrived].submitted_at <= now:
            queued.append(coming[arrived])
            arrived += 1
        while queued and active < slots:
            place = 0
            if active + len(queued) > slots and len(queued) > 1:
                place = policy.next_job(queued, [call.job for call in waiting if call.job], now)
            job = queued.pop(place)
            waiting.append(Waiting(job.shape, job.rows, order, job))
            order, active = order + 1, active + 1
        picked = set(policy.pick(waiting, now))
        calls = [waiting[i] for i in picked]
        waiting = [call for i, call in enumerate(waiting) if i not in picked]
        rows = sum(call.rows for call in calls)
        took = (seconds[calls[0].key] if isinstance(seconds, Mapping) else seconds)(rows)
        now += took
        served = [call.job for call in calls if call.job is not None]
        policy.ran(calls[0].key, rows, took, served, now)
        for call, job in zip(calls, served, strict=True):
            job.steps_done += 1
            if job.steps_done == job.steps:
                finished[job] = now
                active -= 1
            else:
                waiting.append(Waiting(call.key, call.rows, order, job))
                order += 1
    return finished


def latencies(finished: Mapping[Job, float]) -> list[float]:
    return [end - job.submitted_at for job, end in finished.items()]


def mean_latency(finished: Mapping[Job, float]) -> float:
    return statistics.mean(latencies(finished))


def p95_latency(finished: Mapping[Job, float]) -> float:
    return statistics.quantiles(latencies(finished), n=20)[18]
