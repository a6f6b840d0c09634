"""One device on a virtual clock: jobs arrive, the scheduler picks, a forward takes what a table says."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

from deployments.engine.scheduled_job import ParkedCall, ScheduledJob

Curve = Callable[[int], float]  # rows -> seconds


class Policy(Protocol):
    def pick(self, waiting: Sequence[ParkedCall], now: float) -> list[int]: ...
    def record_forward(
        self, key: Hashable, batch_size: int, seconds: float, jobs: Sequence[ScheduledJob], now: float
    ) -> None: ...
    def next_job(self, queued: Sequence[ScheduledJob], active: Sequence[ScheduledJob], now: float) -> int: ...


def curve(*points: tuple[int, float]) -> Curve:
    """Straight lines between (rows, seconds); beyond the last one its line goes on."""

    def seconds(batch_size: int) -> float:
        for (low, fast), (high, slow) in pairwise(points):
            if batch_size <= high or high == points[-1][0]:
                return fast + (batch_size - low) * (slow - fast) / (high - low)
        return points[0][1] * batch_size

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
) -> list[ScheduledJob]:
    """Poisson arrivals, each of another user; every shape is as likely."""
    chance = random.Random(seed)
    now, jobs = 0.0, []
    for number in range(count):
        now += chance.expovariate(per_second)
        planned = chance.choices(list(steps), list(steps.values()))[0]
        shape = chance.choice(shapes) if len(shapes) > 1 else shapes[0]
        jobs.append(ScheduledJob(user=f"user {number}", submitted_at=now, steps=planned, shape=shape))
    return jobs


def run(
    policy: Policy,
    jobs: Sequence[ScheduledJob],
    seconds: Curve | Mapping[Hashable, Curve],
    *,
    slots: int = 10**9,
) -> dict[ScheduledJob, float]:
    """When each job was finished, in the order of finishing. `slots` of them run at once.

    seconds: of a forward; or by shape, where only equal shapes share forwards.
    """
    coming = sorted(jobs, key=lambda job: job.submitted_at)
    now, order, arrived, active = 0.0, 0, 0, 0
    queued: list[ScheduledJob] = []
    waiting: list[ParkedCall] = []
    finished: dict[ScheduledJob, float] = {}
    while len(finished) < len(jobs):
        if not waiting and not queued:
            now = max(now, coming[arrived].submitted_at)
        while arrived < len(coming) and coming[arrived].submitted_at <= now:
            queued.append(coming[arrived])
            arrived += 1
        while queued and active < slots:
            chosen = 0
            if active + len(queued) > slots and len(queued) > 1:
                chosen = policy.next_job(queued, [call.job for call in waiting if call.job], now)
            job = queued.pop(chosen)
            waiting.append(ParkedCall(job.shape, job.batch_size, order, job))
            order, active = order + 1, active + 1
        picked = set(policy.pick(waiting, now))
        calls = [waiting[i] for i in picked]
        waiting = [call for i, call in enumerate(waiting) if i not in picked]
        batch_size = sum(call.batch_size for call in calls)
        took = (seconds[calls[0].key] if isinstance(seconds, Mapping) else seconds)(batch_size)
        now += took
        served = [call.job for call in calls if call.job is not None]
        policy.record_forward(calls[0].key, batch_size, took, served, now)
        for call, job in zip(calls, served, strict=True):
            job.steps_done += 1
            if job.steps_done == job.steps:
                finished[job] = now
                active -= 1
            else:
                waiting.append(ParkedCall(call.key, call.batch_size, order, job))
                order += 1
    return finished


def latencies(finished: Mapping[ScheduledJob, float]) -> list[float]:
    return [end - job.submitted_at for job, end in finished.items()]


def mean_latency(finished: Mapping[ScheduledJob, float]) -> float:
    return statistics.mean(latencies(finished))


def p95_latency(finished: Mapping[ScheduledJob, float]) -> float:
    return statistics.quantiles(latencies(finished), n=20)[18]
