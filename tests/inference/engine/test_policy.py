"""The policy's pure functions: who counts as submitted earlier, and by how much."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.fair_share import FairShare
from deployments.engine.policy import MAX_BOOST_S, base_score, is_urgent, size_boost_s
from deployments.engine.scheduled_job import ScheduledJob

SECONDS = st.floats(0, 1e6)


@given(SECONDS, SECONDS, SECONDS)
def test_a_shorter_job_never_has_a_smaller_boost(work_s: float, longer_s: float, backlog_s: float) -> None:
    shorter, longer = sorted((work_s, longer_s))

    assert MAX_BOOST_S >= size_boost_s(shorter, backlog_s) >= size_boost_s(longer, backlog_s) >= 0.0


def test_only_a_job_without_work_has_a_boost_while_nothing_waits() -> None:
    assert size_boost_s(0.1, 0.0) == 0.0
    assert size_boost_s(0.0, 0.0) == MAX_BOOST_S


@pytest.mark.parametrize(
    ("left_s", "urgent"), [(0.9, False), (1.0, True), (5.0, True), (5.1, False), (-1.0, False)]
)
def test_a_deadline_is_urgent_while_it_is_near_and_can_be_kept(left_s: float, urgent: bool) -> None:
    assert is_urgent(left_s, shortest_s=1.0, longest_s=2.0) is urgent


def test_a_class_and_an_urgent_deadline_count_as_five_minutes_each() -> None:
    assert base_score(1000.0, 1, 0.0, urgent=True) == 1000.0 - 2 * MAX_BOOST_S
    assert base_score(1000.0, -1, 20.0, urgent=False) == 1000.0 + MAX_BOOST_S - 20.0


def test_a_forward_delays_the_other_jobs_of_its_user_only() -> None:
    shares = FairShare()
    served, same, other = ScheduledJob("a"), ScheduledJob("a"), ScheduledJob("b")
    shares.observe(["a", "b"])

    shares.charge([served], seconds=2.0, rows=1, now=10.0)

    assert [shares.delay_s(job) for job in (served, same, other)] == [0.0, 4.0, 0.0]
    assert shares.delay_s(other, ahead_s=1e6) == MAX_BOOST_S
