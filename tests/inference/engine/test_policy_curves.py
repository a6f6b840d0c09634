"""The promises of docs/scheduling.md on a virtual clock with published curves."""

from __future__ import annotations

import random
import statistics
from collections.abc import Hashable, Mapping, Sequence

import pytest

from deployments.engine.policy import MAX_BOOST_S
from deployments.engine.scheduled_job import ParkedCall, ScheduledJob
from deployments.engine.step_scheduler import StepScheduler
from tests.inference.engine.simulation import (
    MIXED,
    SATURATED,
    UNSATURATED,
    Curve,
    arrivals,
    latencies,
    mean_latency,
    mean_steps,
    p95_latency,
    run,
)

UNIFORM = {20: 1.0}
BOTH = {"512": UNSATURATED, "1024": SATURATED}


class FirstCome:
    """All that wait, the longest waiting first, up to so many rows; 1: one request after another."""

    def __init__(self, batch_size: int) -> None:
        self._rows = batch_size

    def pick(self, waiting: Sequence[ParkedCall], now: float) -> list[int]:
        if self._rows == 1:
            return [min(range(len(waiting)), key=lambda i: waiting[i].job.submitted_at)]
        return sorted(range(len(waiting)), key=lambda i: waiting[i].order)[: self._rows]

    def record_forward(
        self, key: Hashable, batch_size: int, seconds: float, jobs: Sequence[ScheduledJob], now: float
    ) -> None:
        pass

    def next_job(self, queued: Sequence[ScheduledJob], active: Sequence[ScheduledJob], now: float) -> int:
        return 0


def load(times: float, curve: Curve, seed: int, steps: Mapping[int, float] = MIXED) -> list[ScheduledJob]:
    """300 jobs; the load is relative to one request after another."""
    return arrivals(300, times / curve(1) / mean_steps(steps), seed, steps)


def warm(curves: Mapping[Hashable, Curve]) -> StepScheduler:
    """It has learned every shape."""
    scheduler = StepScheduler(8)
    for shape in curves:
        run(scheduler, [ScheduledJob(user=f"before {n}", steps=8, shape=shape) for n in range(12)], curves)
    return scheduler


@pytest.mark.parametrize("seed", range(3))
def test_saturated_mixed_steps_wait_a_fifth_less_and_the_longest_waits_hardly_grow(seed: int) -> None:
    ours = run(StepScheduler(8), load(0.8, SATURATED, seed), SATURATED)
    shared = run(FirstCome(8), load(0.8, SATURATED, seed), SATURATED)
    serial = run(FirstCome(1), load(0.8, SATURATED, seed), SATURATED)

    assert mean_latency(ours) <= 0.8 * min(mean_latency(shared), mean_latency(serial))
    assert p95_latency(ours) <= 1.03 * min(p95_latency(shared), p95_latency(serial))


@pytest.mark.parametrize("seed", range(3))
def test_uniform_steps_lose_nothing_against_one_after_another(seed: int) -> None:
    ours = run(StepScheduler(8), load(0.8, SATURATED, seed, UNIFORM), SATURATED)
    serial = run(FirstCome(1), load(0.8, SATURATED, seed, UNIFORM), SATURATED)

    assert mean_latency(ours) <= 1.03 * mean_latency(serial)


@pytest.mark.parametrize(("times", "slack"), [(0.5, 1.005), (0.9, 1.005), (1.5, 1.005), (2.5, 1.0)])
def test_where_batching_pays_it_is_as_good_as_sharing_all_steps(times: float, slack: float) -> None:
    ours = run(StepScheduler(8), load(times, UNSATURATED, 0), UNSATURATED)
    shared = run(FirstCome(8), load(times, UNSATURATED, 0), UNSATURATED)

    assert mean_latency(ours) <= slack * mean_latency(shared)
    assert p95_latency(ours) <= slack * p95_latency(shared)


@pytest.mark.parametrize(("curve", "batch_size"), [(UNSATURATED, 8), (SATURATED, 1)])
def test_throughput_of_a_full_queue_is_that_of_the_best_static_batch(curve: Curve, batch_size: int) -> None:
    jobs = [ScheduledJob(user=str(n), steps=20, shape="square") for n in range(160)]

    finished = run(StepScheduler(8), jobs, curve)

    assert 160 * 20 / max(finished.values()) >= 0.97 * batch_size / curve(batch_size)


def test_no_job_starves_under_overload_of_several_shapes_and_users() -> None:
    """Three of the worst off beside endless short jobs of a class higher."""
    old = [
        ScheduledJob("greedy", priority=0, steps=50, shape="512"),
        ScheduledJob("greedy", priority=0, steps=50, shape="1024"),
        ScheduledJob("modest", priority=0, steps=50, shape="1024"),
    ]
    # half of the jobs are of either shape: 1.3 times what one after another can do
    short = arrivals(3000, 1.3 / (4 * (0.167 + 0.243) / 2), 0, {4: 1.0}, tuple(BOTH))
    for job in short:
        job.priority = 1
    bound = 4 * MAX_BOOST_S  # seconds of submissions that may go first

    finished = run(StepScheduler(8), [*old, *short], BOTH)

    ahead = sum(4 * BOTH[job.shape](1) for job in short if job.submitted_at <= bound)
    work = ahead + sum(50 * BOTH[job.shape](1) for job in old)
    assert max(finished[job] for job in old) <= max(bound, work)
    assert max(job.submitted_at for job in short) > bound


def test_a_user_with_fifty_requests_hardly_delays_one_with_one() -> None:
    many = [ScheduledJob("many", steps=20, shape="square") for _ in range(50)]
    one = ScheduledJob("one", steps=20, shape="square", submitted_at=60.0)

    finished = run(StepScheduler(8), [*many, one], SATURATED)

    assert finished[one] - 60.0 <= 3 * 20 * 0.243  # itself, one that runs, and a rest
    assert finished[many[-1]] == pytest.approx(51 * 20 * 0.243, rel=0.02)


def test_users_who_all_wait_share_the_device_evenly() -> None:
    jobs = [ScheduledJob(user, steps=20, shape="square") for user in "aaaaaaaaaaaaaaaaaaaaaaaabbbbbbbbcccc"]

    first = list(run(StepScheduler(8), jobs, SATURATED))[:12]

    assert [sum(job.user == user for job in first) for user in "abc"] == [4, 4, 4]


def test_high_priority_waits_least_and_low_priority_most() -> None:
    jobs = load(0.9, SATURATED, 1)
    for number, job in enumerate(jobs):
        job.priority = number % 3 - 1

    finished = run(StepScheduler(8), jobs, SATURATED)

    high, normal, low = (
        statistics.mean(latencies({job: end for job, end in finished.items() if job.priority == priority}))
        for priority in (1, 0, -1)
    )
    assert high < 0.7 * normal < 0.7 * low


def test_deadlines_that_can_be_kept_are_kept_more_often() -> None:
    def kept(known: bool) -> int:
        jobs = load(0.9, SATURATED, 2)
        due = {job: job.submitted_at + 3 * job.steps * 0.243 + 2 for job in jobs[::4]}
        for job, deadline in due.items():
            job.deadline = deadline if known else None
        finished = run(StepScheduler(8), jobs, SATURATED)
        return sum(finished[job] <= deadline for job, deadline in due.items())

    assert kept(known=True) >= 0.95 * 75
    assert kept(known=True) > kept(known=False)


def test_deadlines_that_are_lost_delay_no_other() -> None:
    lost = load(0.8, SATURATED, 0)
    for job in lost:
        job.deadline = job.submitted_at + 0.1

    late = run(StepScheduler(8), lost, SATURATED)
    free = run(StepScheduler(8), load(0.8, SATURATED, 0), SATURATED)

    assert list(late.values()) == list(free.values())


@pytest.mark.parametrize("seed", range(3))
def test_shapes_take_turns_although_one_is_cheaper(seed: int) -> None:
    per_second = 1.5 / (20 * (0.167 + 0.243) / 2)
    jobs = arrivals(400, per_second, seed, UNIFORM, tuple(BOTH))

    order = [job.shape for job in run(StepScheduler(8), jobs, BOTH)]

    for start in range(0, 300, 20):
        assert 4 <= order[start : start + 20].count("512") <= 16


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("shapes", "users", "slots"),
    [(("1024",), 60, 8), (("512",), 60, 16), (("512", "1024"), 60, 8), (("512", "1024"), 3, 16)],
)
def test_the_forecast_errs_by_a_tenth_of_the_time_until_all_is_done(
    shapes: tuple[str, ...], users: int, slots: int, seed: int
) -> None:
    scheduler = warm(BOTH)
    chance = random.Random(seed)
    jobs = [
        ScheduledJob(
            f"user {chance.randrange(users)}",
            steps=chance.choice([4, 8, 20, 50]),
            shape=chance.choice(shapes),
        )
        for _ in range(60)
    ]
    for job in jobs:
        job.submitted_at = 1e4
    active, queued = jobs[:slots], jobs[slots:]
    for job in active:
        job.priority = 1  # they have their slots
        job.steps_done = job.steps_learned = chance.randrange(job.steps)

    forecasts = scheduler.forecast(queued, active, 1e4, slots=slots)
    finished = run(scheduler, jobs, BOTH, slots=slots)

    took = max(finished.values()) - 1e4
    ends = [
        abs(1e4 + forecast.finishes_in_s - finished[job])
        for job, forecast in zip(queued, forecasts, strict=True)
    ]
    assert statistics.mean(ends) <= 0.1 * took
    freed = [end - 1e4 for end in finished.values()]  # one slot each
    expected = sorted(forecast.starts_in_s for forecast in forecasts)
    starts = [abs(start - free) for start, free in zip(expected, freed, strict=False)]
    assert statistics.mean(starts) <= 0.1 * took


def test_a_long_queue_is_forecast_to_its_end() -> None:
    jobs = [ScheduledJob(str(n), steps=20, shape="1024") for n in range(500)]

    last = max(each.finishes_in_s for each in warm(BOTH).forecast(jobs, [], 0.0, slots=8))

    assert last == pytest.approx(500 * 20 * 0.243, rel=0.02)


def test_nothing_learned_means_no_times() -> None:
    forecasts = StepScheduler(8).forecast([ScheduledJob(steps=8), ScheduledJob(steps=4)], [], 0.0)

    assert [(each.ahead, each.finishes_in_s) for each in forecasts] == [(1, None), (0, None)]
