"""Who runs next: first come, first served, with everybody who fits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.step_scheduler import StepScheduler, Waiting


def test_the_longest_waiting_call_leads_and_its_likes_come_along() -> None:
    waiting = [Waiting("a", 1, 5), Waiting("b", 1, 2), Waiting("a", 1, 3), Waiting("b", 2, 4)]

    picked = StepScheduler(max_rows=8).pick(waiting)

    assert picked == [1, 3]


def test_a_forward_never_has_more_rows_than_the_cap_unless_one_call_alone_has() -> None:
    scheduler = StepScheduler(max_rows=4)

    assert scheduler.pick([Waiting("a", 2, 1), Waiting("a", 3, 2), Waiting("a", 2, 3)]) == [0, 2]
    assert scheduler.pick([Waiting("a", 6, 1), Waiting("a", 1, 2)]) == [0]


def test_calls_without_a_key_run_alone() -> None:
    assert StepScheduler(max_rows=8).pick([Waiting(None, 1, 1), Waiting(None, 1, 2)]) == [0]


def test_a_key_that_ran_out_of_memory_gets_half_the_rows_and_others_keep_theirs() -> None:
    scheduler = StepScheduler(max_rows=8)
    scheduler.ran_out_of_memory("big", rows=8)

    assert len(scheduler.pick([Waiting("big", 1, i) for i in range(8)])) == 4
    assert len(scheduler.pick([Waiting("small", 1, i) for i in range(8)])) == 8


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(1, 4)), min_size=1, max_size=30),
    st.integers(1, 8),
)
def test_nobody_waits_for_more_forwards_than_there_are_calls_before_it(
    calls: list[tuple[str | None, int]], max_rows: int
) -> None:
    scheduler = StepScheduler(max_rows)
    waiting = [Waiting(key, rows, i) for i, (key, rows) in enumerate(calls)]
    served: list[int] = []

    while waiting:
        picked = {waiting[i] for i in scheduler.pick(waiting)}
        assert min(waiting, key=lambda w: w.parked_at) in picked
        assert len({w.key for w in picked}) == 1
        served += [w.parked_at for w in picked]
        waiting = [w for w in waiting if w not in picked]

    assert sorted(served) == list(range(len(calls)))
