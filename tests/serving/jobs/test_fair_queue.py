"""Who waits how long: nobody is starved by somebody with many jobs, and estimates are honest."""

from __future__ import annotations

import heapq
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.protocol.errors import Overloaded
from deployments.protocol.request import Priority
from serve_app.job_ids import new_job_id
from serve_app.jobs.job import JobError, NewJob, SubmitOptions
from serve_app.jobs.store.fair_queue import assign_tag, start_tag_of
from serve_app.jobs.store.keys import Keys
from serve_app.jobs.store.start_estimate import Capacity, Throughput
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.settings import Settings
from tests.serving.fakes import MODEL, eventually, resolved
from tests.serving.jobs.test_dispatch import ended, submitted

OWNERS = ("heavy", "light", "third")
ACCEPT = st.tuples(st.just("accept"), st.sampled_from(OWNERS))
CLAIM = st.tuples(st.just("claim"), st.just(""))


class Queue:
    """A model's queue as the store keeps it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.finish_tag = Counter[str]()
        self.arrivals = 0
        self.waiting: list[tuple[float, str, Priority]] = []

    def accept(self, owner: str, priority: Priority = "normal") -> None:
        flow = f"{priority}:{owner}"
        if not self.waiting:
            self.finish_tag.clear()
        turn = assign_tag(self.now, self.finish_tag[flow], self.arrivals, priority)
        self.arrivals += 1
        self.finish_tag[flow] = turn.finish_tag  # type: ignore[assignment]
        heapq.heappush(self.waiting, (turn.score, owner, priority))

    def claim(self) -> str:
        score, owner, priority = heapq.heappop(self.waiting)
        self.now = max(self.now, start_tag_of(score, priority))
        return owner


@given(st.lists(st.one_of(ACCEPT, CLAIM), max_size=200))
def test_who_comes_with_one_job_waits_for_at_most_two_of_everybody_else(
    schedule: list[tuple[str, str]],
) -> None:
    queue = Queue()
    overtaken: dict[str, Counter[str]] = {}  # per owner whose first job waits: who was served since

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
                assert since[served] <= 2  # one, and one more for who was just served


@given(st.integers(1, 40), st.integers(1, 40))
def test_two_owners_with_jobs_waiting_are_served_in_turns(first: int, second: int) -> None:
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


async def test_the_store_serves_a_newcomer_before_the_rest_of_a_long_queue(store: JobStore) -> None:
    for _ in range(20):
        await store.accept(NewJob(new_job_id(), "heavy", resolved()))
    first = await store.leases.claim({MODEL: 1})
    newcomer = await store.accept(NewJob(new_job_id(), "light", resolved()))

    position = await store.position(newcomer)
    owners = [claim.job.owner for _ in range(3) if (claim := await store.leases.claim({MODEL: 1}))]

    assert first is not None
    assert position in (1, 2)
    assert "light" in owners[:2]


async def test_a_job_that_is_given_back_keeps_its_turn(store: JobStore) -> None:
    ids = [(await store.accept(NewJob(new_job_id(), "heavy", resolved()))).id for _ in range(4)]
    claim = await store.leases.claim({MODEL: 1})
    assert claim is not None

    await store.leases.requeue(claim, JobError("model_unavailable", "lost"))

    again = await store.leases.claim({MODEL: 1})
    assert again is not None
    assert again.job.id == ids[0]


@pytest.mark.parametrize(
    ("position", "capacity", "recent_s", "expected"),
    [
        (1, Capacity(2, 1), (), 0.0),  # there is a free slot
        (1, Capacity(2, 0), (), None),  # nothing is known of this model
        (3, Capacity(0, 0), (4.0,), None),  # no dispatcher has told of capacity
        (3, Capacity(2, 0), (4.0, 8.0), 9.0),
        (3, Capacity(2, 1), (4.0, 8.0), 6.0),
    ],
)
def test_an_estimate_is_made_of_recent_times_and_room_or_not_at_all(
    position: int, capacity: Capacity, recent_s: tuple[float, ...], expected: float | None
) -> None:
    assert Throughput(capacity, recent_s).starts_in_s(position) == expected


async def test_a_model_whose_queue_is_too_long_refuses_and_says_when_to_come_back(
    store: JobStore, settings: Settings
) -> None:
    await store.throughput.report("a dispatcher", {MODEL: Capacity(4, 0)})
    await store.redis.lpush(Keys(settings.redis_prefix).durations(MODEL), "60.0")
    waiting = await store.accept(NewJob(new_job_id(), "heavy", resolved()))

    estimate = await store.throughput.starts_in_s(waiting.request.model, 1)
    with pytest.raises(Overloaded, match="would wait about") as refusal:
        await store.accept(NewJob(new_job_id(), "light", resolved(), options=SubmitOptions(max_wait_s=1.0)))
    patient = await store.accept(
        NewJob(new_job_id(), "light", resolved(), options=SubmitOptions(max_wait_s=600.0))
    )

    assert estimate == 15.0
    assert refusal.value.retry_after_s == pytest.approx(29.0)
    assert await store.position(patient) == 2


async def test_a_dispatcher_tells_of_its_room_and_how_long_jobs_took(
    store: JobStore, dispatcher: Dispatcher
) -> None:
    job = await ended(store, await submitted(store))

    async def is_told() -> bool:
        return await store.throughput.starts_in_s(job.request.model, 1) == 0.0

    await eventually(is_told)
