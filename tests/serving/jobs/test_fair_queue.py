"""Start-time fair queueing: equal shares for owners, weights for priorities, exact scores (no server)."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.protocol.request import Priority
from serve_app.jobs.store.fair_queue import (
    ARRIVALS,
    COST,
    HEAD_START,
    RESOLUTION,
    QueueTag,
    assign_tag,
    flow_of,
    start_tag_of,
)

OWNERS = ("heavy", "light", "third")
ACCEPT = st.tuples(st.just("accept"), st.sampled_from(OWNERS))
CLAIM = st.tuples(st.just("claim"), st.just(""))
PRIORITIES: list[Priority] = ["low", "normal", "high"]


class Queue:
    """A model's queue as the store keeps it."""

    def __init__(self) -> None:
        self.virtual_time = 0.0
        self.finish_tags: defaultdict[str, float] = defaultdict(float)
        self.arrivals = 0
        self.waiting: list[tuple[float, str, Priority]] = []

    def accept(self, owner: str, priority: Priority = "normal") -> None:
        flow = flow_of(owner, priority)
        if not self.waiting:
            self.finish_tags.clear()
        tag = assign_tag(self.virtual_time, self.finish_tags[flow], self.arrivals, priority)
        self.arrivals += 1
        self.finish_tags[flow] = tag.finish_tag
        heapq.heappush(self.waiting, (tag.score, owner, priority))

    def claim(self) -> str:
        score, owner, priority = heapq.heappop(self.waiting)
        self.virtual_time = max(self.virtual_time, start_tag_of(score, priority))
        return owner


@given(st.lists(st.one_of(ACCEPT, CLAIM), max_size=200))
def test_an_owner_with_one_job_waits_for_at_most_two_jobs_of_each_other_owner(
    schedule: list[tuple[str, str]],
) -> None:
    queue = Queue()
    overtaken: dict[str, Counter[str]] = {}  # by owner whose first job waits: jobs served since, by owner

    for action, owner in schedule:
        if action == "accept":
            if not any(waiting == owner for _, waiting, _ in queue.waiting):
                overtaken[owner] = Counter()
            queue.accept(owner)
        elif queue.waiting:
            served = queue.claim()
            overtaken.pop(served, None)
            for since in overtaken.values():
                since[served] += 1
                assert since[served] <= 2  # one, and one more for the owner that was just served


@given(st.integers(1, 40), st.integers(1, 40))
def test_two_owners_with_jobs_waiting_are_served_alternately(first: int, second: int) -> None:
    queue = Queue()
    for _ in range(first):
        queue.accept("first")
    for _ in range(second):
        queue.accept("second")

    served = [queue.claim() for _ in range(2 * min(first, second))]

    assert abs(served.count("first") - served.count("second")) <= 1


def test_priorities_share_four_to_one_and_none_is_starved() -> None:
    queue = Queue()
    for _ in range(400):
        queue.accept("heavy", "high")
    for _ in range(400):
        queue.accept("light", "normal")

    served = Counter(queue.claim() for _ in range(400))

    assert served["light"] > 60
    assert served["heavy"] > 3 * served["light"]


def test_an_urgent_job_comes_before_a_hundred_owners_with_one_job_each() -> None:
    queue = Queue()
    for number in range(100):
        queue.accept(f"owner {number}")
    queue.accept("operator", "high")

    assert queue.claim() == "operator"


@pytest.mark.parametrize(
    ("virtual_time", "finish_tag", "priority", "start_tag"),
    [(0.0, 0.0, "normal", 0.0), (3.0, 2.0, "normal", 3.0), (3.0, 7.0, "low", 7.0), (4.0, 4.25, "high", 4.25)],
)
def test_a_flow_starts_at_the_virtual_time_or_after_its_last_job(
    virtual_time: float, finish_tag: float, priority: Priority, start_tag: float
) -> None:
    tag = assign_tag(virtual_time, finish_tag, 0, priority)

    assert tag == QueueTag(start_tag + HEAD_START[priority], start_tag + COST[priority])


@given(st.integers(0, 2**30), st.integers(0, 2**21), st.sampled_from(PRIORITIES))
def test_the_start_tag_is_recovered_exactly_from_a_score(
    quarters: int, arrival: int, priority: Priority
) -> None:
    start_tag = quarters * RESOLUTION

    tag = assign_tag(start_tag, 0.0, arrival, priority)

    assert start_tag_of(tag.score, priority) == start_tag
    assert tag.finish_tag == start_tag + COST[priority]


@given(st.integers(0, ARRIVALS - 2), st.integers(0, 2**30), st.sampled_from(PRIORITIES))
def test_equal_start_tags_are_served_in_the_order_of_arrival(
    arrival: int, quarters: int, priority: Priority
) -> None:
    start_tag = quarters * RESOLUTION
    first = assign_tag(start_tag, 0.0, arrival, priority)
    second = assign_tag(start_tag, 0.0, arrival + 1, priority)

    assert first.score < second.score
    assert second.score < assign_tag(start_tag + RESOLUTION, 0.0, 0, priority).score


def test_arrival_numbers_start_again() -> None:
    assert assign_tag(1.0, 0.0, ARRIVALS + 3, "normal") == assign_tag(1.0, 0.0, 3, "normal")


def test_costs_and_head_starts_are_multiples_of_the_resolution() -> None:
    assert all(value % RESOLUTION == 0 for value in (*COST.values(), *HEAD_START.values()))
    assert COST["normal"] / COST["high"] == COST["low"] / COST["normal"] == 4
    assert HEAD_START["high"] < HEAD_START["normal"] == 0 < HEAD_START["low"]


def test_flows_of_owners_and_priorities_are_distinct() -> None:
    names = {flow_of(owner, priority) for owner in ("a", "b") for priority in PRIORITIES}

    assert len(names) == 6
    assert flow_of("ada", "low") == "low:ada"
