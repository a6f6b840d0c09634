"""Seconds by batch size that were measured before are known after the first forward."""

from __future__ import annotations

from deployments.engine.cost_model import CostModel
from deployments.engine.scheduled_job import ParkedCall, ScheduledJob
from deployments.engine.step_scheduler import StepScheduler

MEASURED = {1: 0.10, 2: 0.11, 4: 0.13, 8: 0.26}


def test_the_best_size_is_known_at_once() -> None:
    costs = CostModel(16)
    costs.record("key", 1, 0.1)

    assert costs.seed("key", MEASURED)

    assert costs.best_batch_size("key") == 4
    assert costs.largest_trial("key") in (0, 16)
    assert costs.seconds("key", 8) == MEASURED[8]


def test_nothing_is_known_of_a_key_without_a_forward() -> None:
    costs = CostModel(16)

    assert not costs.seed("key", MEASURED)

    assert costs.best_batch_size("key") == 1


def test_a_first_forward_with_a_warm_up_does_not_count() -> None:
    costs = CostModel(16)
    costs.record("key", 1, 9.0)

    assert costs.seed("key", MEASURED)

    assert costs.seconds("key", 1) == MEASURED[1]


def test_what_was_learned_twice_stays_and_the_rest_is_in_its_proportion() -> None:
    costs = CostModel(16)
    for _ in range(2):
        costs.record("key", 2, 0.165)

    assert costs.seed("key", MEASURED)

    assert costs.seconds("key", 2) == 0.165
    assert costs.seconds("key", 4) == MEASURED[4] * 1.5


def test_another_machine_s_seconds_are_refused() -> None:
    slow, fast = CostModel(16), CostModel(16)
    for _ in range(2):
        slow.record("key", 1, 0.21)
    fast.record("key", 1, 0.04)

    assert not slow.seed("key", MEASURED)
    assert not fast.seed("key", MEASURED)

    assert (slow.best_batch_size("key"), fast.best_batch_size("key")) == (1, 1)


def test_sizes_that_do_not_fit_are_left_out() -> None:
    costs = CostModel(16, lambda _key: 2)
    costs.record("key", 1, 0.1)

    assert costs.seed("key", MEASURED)

    assert costs.best_batch_size("key") == 2


def test_a_scheduler_merges_calls_of_a_seeded_shape_at_once() -> None:
    scheduler = StepScheduler(16)
    first = ScheduledJob(steps=2, shape="square", submitted_at=0.0)
    first.steps_done = 1
    scheduler.record_forward("key", 1, 0.1, [first])
    first.steps_done = 2
    scheduler.record_forward("key", 1, 0.1, [first])
    waiting = [ParkedCall("key", 1, None) for _ in range(4)]
    before = len(scheduler.pick(waiting))

    assert scheduler.seed("square", MEASURED)
    assert not scheduler.seed("other", MEASURED)

    assert before < 4
    assert len(scheduler.pick(waiting)) == 4
