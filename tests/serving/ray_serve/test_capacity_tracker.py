"""What dispatchers report to the autoscaling policy, and how many jobs they keep in the store meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.protocol.card import ModelCard, Serving
from serve_app.job_ids import new_job_id
from serve_app.jobs.job import NewJob
from serve_app.jobs.store.start_estimate import Capacity, Demand
from serve_app.jobs.store.store import JobStore
from serve_app.ray_serve import autoscaling, capacity, served_models
from serve_app.ray_serve.capacity import CapacityTracker
from serve_app.ray_serve.model_client import ModelClient
from serve_app.ray_serve.routing import ReplicaPool, RunningApplication, SingleApplicationRoutes
from serve_app.ray_serve.served_models import ServedModels
from tests.serving.fakes import CARD, MODEL, OWNER, resolved


def cards(**serving: Any) -> dict[str, ModelCard]:
    """Two models that share their replicas."""
    made = {"a": CARD, "b": CARD}
    shared = Serving(group="a", slots=4, **serving)
    return {name: card.model_copy(update={"id": name, "serving": shared}) for name, card in made.items()}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(capacity, "time", made)
    monkeypatch.setattr(served_models, "time", made)
    return made


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int, int]]:
    """Calls of publish_demand, which would write to Ray's store."""
    entries: list[tuple[str, str, int, int]] = []
    monkeypatch.setattr(autoscaling, "publish_demand", lambda *entry: entries.append(entry))
    return entries


def tracker_of(pool: ReplicaPool, **serving: Any) -> tuple[CapacityTracker, ServedModels]:
    """The only dispatcher of two models, whose deployment Serve reports with these replicas."""
    served = ServedModels(SingleApplicationRoutes(cards(**serving), "weft"), "weft", "Dispatcher")
    report(served, pool)
    return CapacityTracker(served, ModelClient(served), 1), served


def report(served: ServedModels, pool: ReplicaPool) -> None:
    pools = {"a": pool, "Dispatcher": ReplicaPool("HEALTHY", running=1, limit=1)}
    served.take_in({"weft": RunningApplication(deployments=pools)})


async def test_the_store_counts_waiting_jobs_and_those_of_all_dispatchers(store: JobStore) -> None:
    for _ in range(3):
        await store.accept(NewJob(new_job_id(), OWNER, resolved()))
    await store.throughput.report("one", {MODEL: Capacity(slots=8, free=3)})
    await store.throughput.report("two", {MODEL: Capacity(slots=8, free=6)})

    assert await store.throughput.demand([MODEL, "other"]) == {MODEL: Demand(3, 7), "other": Demand(0, 0)}
    assert await store.throughput.demand([]) == {}


async def test_models_that_share_replicas_are_reported_as_one_and_only_when_it_changes(
    clock: Clock, published: list[tuple[str, str, int, int]]
) -> None:
    tracker, _ = tracker_of(ReplicaPool("HEALTHY", running=1), max_replicas=3)
    demand = {"a": Demand(5, 2), "b": Demand(1, 1)}

    await tracker.report_demand(demand)
    await tracker.report_demand(demand)
    assert published == [("weft", "a", 6, 3)]
    clock.now += 11
    await tracker.report_demand(demand)
    assert published == [("weft", "a", 6, 3)] * 2
    await tracker.report_demand({"a": Demand(), "b": Demand()})
    clock.now += 11
    await tracker.report_demand({"a": Demand(), "b": Demand()})  # an empty demand is reported once
    assert published[2:] == [("weft", "a", 0, 0)]


async def test_jobs_of_a_sleeping_model_stay_in_the_store_until_it_runs(
    clock: Clock, published: list[tuple[str, str, int, int]]
) -> None:
    asleep, starting, awake = (
        ReplicaPool("HEALTHY"),
        ReplicaPool("UPSCALING"),
        ReplicaPool("HEALTHY", running=2),
    )
    tracker, served = tracker_of(asleep, max_replicas=3)
    assert tracker.free_slots()["a"] == 0
    await tracker.report_demand({"a": Demand(9, 0), "b": Demand()})
    assert published == [("weft", "a", 9, 0)]
    assert tracker.free_slots()["a"] == 0

    clock.now += 3600
    report(served, starting)
    assert tracker.free_slots()["a"] == 0
    report(served, awake)
    assert tracker.free_slots()["a"] == 4 * 3


async def test_a_policy_that_does_not_react_lets_no_job_wait_for_ever(
    clock: Clock, published: list[tuple[str, str, int, int]]
) -> None:
    tracker, served = tracker_of(ReplicaPool("HEALTHY"), max_replicas=3)
    await tracker.report_demand({"a": Demand(9, 0), "b": Demand()})
    clock.now += capacity.WAKE_TIMEOUT_S + 1
    report(served, ReplicaPool("HEALTHY"))
    assert tracker.free_slots()["a"] == 4
    assert tracker.free_slots()["b"] == 0  # no job waits for it


async def test_a_model_of_one_replica_is_woken_by_its_first_job(clock: Clock) -> None:
    tracker, _ = tracker_of(ReplicaPool("HEALTHY"), max_replicas=1)
    assert tracker.free_slots() == {"a": 4, "b": 4}
