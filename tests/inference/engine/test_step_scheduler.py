"""Who runs next, one decision at a time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.cost_model import CAP_FORWARDS, MAX_KEYS
from deployments.engine.fair_share import MAX_USERS
from deployments.engine.policy import MAX_BOOST_S
from deployments.engine.scheduled_job import ParkedCall, ScheduledJob
from deployments.engine.step_costs import MAX_SHAPES
from deployments.engine.step_scheduler import StepScheduler
from tests.inference.engine.simulation import SATURATED, UNSATURATED, Curve


def calls(*jobs: ScheduledJob, key: str = "a") -> list[ParkedCall]:
    return [ParkedCall(key, job.batch_size, order, job) for order, job in enumerate(jobs)]


def learned(curve: Curve, forwards: int = 20) -> StepScheduler:
    scheduler = StepScheduler(max_batch_size=8)
    teach(scheduler, curve, forwards)
    return scheduler


def teach(scheduler: StepScheduler, curve: Curve, forwards: int = 20) -> None:
    """A full queue."""
    jobs = [ScheduledJob(user=f"taught {n}", steps=10**4) for n in range(8)]
    for _ in range(forwards):
        picked = [jobs[i] for i in scheduler.pick(calls(*jobs), 0.0)]
        scheduler.record_forward("a", len(picked), curve(len(picked)), picked, 0.0)
        for job in picked:
            job.steps_done += 1


def rows_picked(scheduler: StepScheduler) -> int:
    return len(scheduler.pick(calls(*[ScheduledJob() for _ in range(8)]), 0.0))


def serve(
    scheduler: StepScheduler, job: ScheduledJob, *forwards: tuple[str, float], now: float = 0.0
) -> None:
    """One step of the job: forwards of (key, seconds), one row each."""
    for key, seconds in forwards:
        scheduler.record_forward(key, job.batch_size, seconds, [job], now)
    job.steps_done += 1


def test_forwards_grow_where_batching_pays_and_stay_small_where_it_does_not() -> None:
    assert rows_picked(learned(UNSATURATED)) == 8
    assert rows_picked(learned(SATURATED)) == 1


def test_a_changed_machine_is_learned_anew_both_ways() -> None:
    scheduler = learned(SATURATED)
    teach(scheduler, lambda batch_size: 0.01 + 0.001 * batch_size)
    assert rows_picked(scheduler) == 8
    teach(scheduler, SATURATED)
    assert rows_picked(scheduler) <= 2


def waiting_calls(rows: int, count: int, sizes: tuple[int, ...] | None = None) -> list[ParkedCall]:
    return [ParkedCall("a", rows, order, sizes=sizes) for order in range(count)]


def sizes_tried(
    scheduler: StepScheduler, waiting: list[ParkedCall], forwards: int, curve: Curve
) -> list[int]:
    """Batch sizes, with padding, of so many forwards while these calls wait every time."""
    tried = []
    for _ in range(forwards):
        picked = [waiting[i] for i in scheduler.pick(waiting, 0.0)]
        rows, sizes = sum(call.batch_size for call in picked), picked[0].sizes
        padded_rows = rows if not sizes or len(picked) == 1 else min(size for size in sizes if size >= rows)
        scheduler.record_forward("a", padded_rows, curve(padded_rows))
        tried.append(padded_rows)
    return tried


def test_only_allowed_batch_sizes_are_tried() -> None:
    tried = sizes_tried(StepScheduler(8), waiting_calls(1, 8, (3, 6)), 20, UNSATURATED)

    assert set(tried) == {1, 3, 6}
    assert tried[-1] == 6


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("sizes", [None, (1, 2, 3, 4, 6, 8), (2, 4, 6, 8)])
def test_calls_of_several_rows_reach_the_batch_size_that_four_of_them_fill(
    rows: int, sizes: tuple[int, ...] | None
) -> None:
    fits = 8 // rows * rows if rows > 1 else 4

    tried = sizes_tried(StepScheduler(8), waiting_calls(rows, 4, sizes), 20, UNSATURATED)

    assert fits in tried[:16]
    assert tried[-1] == fits


BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=12),
    st.sets(st.sampled_from(BUCKETS), min_size=1),
    st.sampled_from([8, 12, 16, 64]),
    st.booleans(),
)
def test_where_larger_forwards_pay_calls_of_any_sizes_fill_the_largest_that_they_can(
    rows: list[int], buckets: set[int], max_rows: int, any_size: bool
) -> None:
    """At least four fifths of the rows that fit, counted with padding, where every larger one is faster."""
    sizes = None if any_size else tuple(sorted(size for size in buckets if size <= max_rows))
    waiting = [ParkedCall("a", n, order, sizes=sizes) for order, n in enumerate(rows)]

    tried = sizes_tried(StepScheduler(max_rows), waiting, 120, lambda batch_size: 1 + batch_size / 1000)

    assert max(tried) <= max(max_rows, *rows)
    assert tried[-1] >= 0.8 * rows_that_fit(rows, max_rows if sizes is None else max(sizes, default=0))


def rows_that_fit(rows: list[int], most: int) -> int:
    """Rows of the calls that one forward takes in their order without leaving any out; the first alone if it
    is larger than any batch size."""
    totals = [total for total in itertools.accumulate(rows) if total <= most]
    return max(totals, default=rows[0])


def test_the_first_forward_of_a_number_of_rows_counts_little() -> None:
    scheduler = StepScheduler(max_batch_size=8)
    for batch_size, seconds in [
        (1, 9.0),
        (1, 0.1),
        (2, 9.0),
        (2, 0.11),
        (4, 9.0),
        (4, 0.12),
    ]:  # 9 s to compile
        assert rows_picked(scheduler) == batch_size
        scheduler.record_forward("a", batch_size, seconds)

    assert rows_picked(scheduler) == 8


@pytest.mark.parametrize("curve", [SATURATED, UNSATURATED])
def test_rows_stay_right_on_a_machine_that_became_half_slower(curve: Curve) -> None:
    scheduler = learned(curve, 300)
    before = rows_picked(scheduler)

    teach(scheduler, lambda batch_size: 1.5 * curve(batch_size), 40)

    assert rows_picked(scheduler) == before
    jobs = [ScheduledJob(steps=100) for _ in range(before)]
    assert scheduler.remaining_s(jobs[0]) == pytest.approx(150 * curve(before) / before, rel=0.05)


def test_a_key_that_ran_out_of_memory_gets_half_the_rows() -> None:
    scheduler = learned(lambda batch_size: 0.1 + 0.001 * batch_size)
    scheduler.record_out_of_memory("a", 8)

    assert rows_picked(scheduler) == 4


def test_the_smaller_batch_size_after_running_out_of_memory_ends() -> None:
    """Twice as late each time: what else took the memory may be gone."""
    scheduler = learned(UNSATURATED)
    holds = []
    for _ in range(2):
        scheduler.record_out_of_memory("a", 8)
        forwards = 0
        while rows_picked(scheduler) <= 4:
            scheduler.record_forward("a", 4, UNSATURATED(4))
            forwards += 1
        holds.append(forwards)
        teach(scheduler, UNSATURATED)

    assert holds[0] >= CAP_FORWARDS
    assert holds[1] >= 2 * CAP_FORWARDS


def test_no_forward_is_larger_than_memory_allows() -> None:
    fitting = {"a": 4}
    scheduler = StepScheduler(8, row_limit=fitting.get)

    assert max(sizes_tried(scheduler, waiting_calls(1, 8), 20, UNSATURATED)) == 4
    fitting["a"] = 8
    assert sizes_tried(scheduler, waiting_calls(1, 8), 20, UNSATURATED)[-1] == 8


def test_only_equal_keys_share_and_a_call_without_key_shares_with_none() -> None:
    scheduler = learned(lambda batch_size: 0.1 + 0.001 * batch_size)

    assert scheduler.pick([ParkedCall("a", 1, 0), ParkedCall("b", 1, 1), ParkedCall("a", 1, 2)], 0.0) == [
        0,
        2,
    ]
    assert scheduler.pick([ParkedCall(None, 1, 0), ParkedCall(None, 1, 1)], 0.0) == [0]


def test_all_that_fits_into_one_forward_goes() -> None:
    scheduler = learned(UNSATURATED)

    assert scheduler.pick(calls(*[ScheduledJob(steps=n + 1) for n in range(8)]), 0.0) == list(range(8))


def test_shortest_remaining_work_leads() -> None:
    assert (
        learned(SATURATED).pick(calls(ScheduledJob(steps=20), ScheduledJob(steps=50, steps_done=48)), 0.0)[0]
        == 1
    )


def test_a_job_that_only_decodes_leads() -> None:
    assert (
        learned(SATURATED).pick(calls(ScheduledJob(steps=4), ScheduledJob(steps=50, steps_done=50)), 0.0)[0]
        == 1
    )


def test_a_class_higher_leads_longer_work() -> None:
    assert (
        learned(SATURATED).pick(calls(ScheduledJob(steps=4), ScheduledJob(steps=50, priority=1)), 0.0)[0] == 1
    )


def test_a_deadline_that_presses_leads_and_one_that_is_lost_or_far_does_not() -> None:
    scheduler = learned(SATURATED)

    leaders = [
        scheduler.pick(calls(ScheduledJob(steps=4), ScheduledJob(steps=20, deadline=deadline)), 0.0)[0]
        for deadline in (1.0, 6.0, 60.0)
    ]

    assert leaders == [0, 1, 0]


def test_a_user_with_much_service_yields_to_one_with_none_and_is_forgiven() -> None:
    scheduler = StepScheduler(max_batch_size=1)
    before = ScheduledJob(user="many", steps=100)
    for _ in range(100):
        serve(scheduler, before, ("a", 0.2), now=20.0)

    def leader(now: float) -> int:
        both = [
            ScheduledJob("many", steps=20, submitted_at=now),
            ScheduledJob("one", steps=20, submitted_at=now + 1),
        ]
        assert scheduler.next_job(both, [], now) == scheduler.pick(calls(*both), now)[0]
        return scheduler.pick(calls(*both), now)[0]

    assert leader(now=10.0) == 1
    assert leader(now=600.0) == 0


def test_a_jobs_own_service_does_not_push_it_back() -> None:
    scheduler = learned(SATURATED)
    half = ScheduledJob(user="half", steps=40)
    for _ in range(20):
        serve(scheduler, half, ("a", 0.243), now=5.0)

    assert scheduler.pick(calls(ScheduledJob(user="new", steps=21, submitted_at=1.0), half), 5.0)[0] == 1


def test_a_slot_goes_to_a_user_who_runs_nothing() -> None:
    queued = [ScheduledJob(user="many", steps=20), ScheduledJob(user="one", steps=20, submitted_at=1.0)]

    assert learned(SATURATED).next_job(queued, [ScheduledJob(user="many", steps=20)], 1.0) == 1


def test_remaining_work_counts_every_call_of_a_step() -> None:
    scheduler = StepScheduler(max_batch_size=1)
    job = ScheduledJob(steps=10, shape="two calls")
    assert scheduler.remaining_s(job) is None

    serve(scheduler, job, ("text encoder", 5.0), ("control", 0.1), ("denoiser", 0.2))
    for _ in range(4):
        serve(scheduler, job, ("control", 0.1), ("denoiser", 0.2))
    for number in range(40):  # others of the shape
        serve(
            scheduler,
            ScheduledJob(steps=50, shape="two calls", steps_done=number),
            ("control", 0.1),
            ("denoiser", 0.2),
        )

    assert scheduler.remaining_s(job) == pytest.approx(5 * 0.3, rel=0.05)


def test_a_forward_is_charged_to_its_own_jobs_by_their_pictures() -> None:
    scheduler = StepScheduler(max_batch_size=8)
    one, three, absent = (
        ScheduledJob(user="one", batch_size=1),
        ScheduledJob(user="three", batch_size=3),
        ScheduledJob(user="absent"),
    )
    scheduler.pick(calls(absent), 0.0)

    scheduler.record_forward("a", 4, 0.4, [one, three], 1.0)

    assert [job.charged_s for job in (one, three, absent)] == pytest.approx([0.1, 0.3, 0.0])


def test_what_is_learned_is_bounded() -> None:
    scheduler = StepScheduler(max_batch_size=1)
    for number in range(2 * MAX_USERS):
        job = ScheduledJob(user=str(number), shape=number, steps=2)
        serve(scheduler, job, (str(number), 0.1))
        serve(scheduler, job, (str(number), 0.1))

    assert len(scheduler._step_costs._shapes) == MAX_SHAPES
    assert len(scheduler._fair_share._clocks) == MAX_USERS
    assert len(scheduler._cost_model._curves) == MAX_KEYS


@given(
    st.integers(1, 50),
    st.sampled_from([-1, 0, 1]),
    st.lists(st.tuples(st.integers(1, 50), st.sampled_from([-1, 0, 1]), st.booleans()), max_size=20),
)
def test_no_job_is_overtaken_by_jobs_submitted_after_the_bound(
    steps: int, priority: int, others: list[tuple[int, int, bool]]
) -> None:
    scheduler = learned(SATURATED)
    bound = MAX_BOOST_S * (4 - priority)
    busy = ScheduledJob(user="old", steps=10**6, shape="other")
    for _ in range(100):  # its user has had all that counts
        serve(scheduler, busy, ("other", 100.0), now=bound)
    old = ScheduledJob(user="old", steps=steps, priority=priority)
    late = [
        ScheduledJob(
            user="new", steps=n, priority=p, submitted_at=bound, deadline=bound + 20 if pressing else None
        )
        for n, p, pressing in others
    ]

    assert scheduler.pick(calls(*late, old), bound)[0] == len(late)


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.integers(1, 4)), min_size=1, max_size=30),
    st.integers(1, 8),
)
def test_every_call_is_served_once_and_no_forward_mixes_keys(
    parked: list[tuple[str | None, int]], max_batch_size: int
) -> None:
    scheduler = StepScheduler(max_batch_size)
    waiting = [ParkedCall(key, batch_size, i) for i, (key, batch_size) in enumerate(parked)]
    served = 0

    while waiting:
        picked = scheduler.pick(waiting, 0.0)
        batch_size = sum(waiting[i].batch_size for i in picked)
        assert picked
        assert len({waiting[i].key for i in picked}) == 1
        assert batch_size <= max_batch_size or len(picked) == 1
        scheduler.record_forward(waiting[picked[0]].key, batch_size, 0.1)
        served += len(picked)
        waiting = [call for i, call in enumerate(waiting) if i not in picked]

    assert served == len(parked)
