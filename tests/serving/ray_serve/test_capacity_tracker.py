"""What dispatchers tell the autoscaling policy, and what they hold back meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.protocol.card import ModelCard, Serving
from serve_app.job_ids import new_job_id
from serve_app.jobs.job import NewJob
from serve_app.jobs.store.start_estimate import Capacity, Demand
from serve_app.jobs.store.store import JobStore
from serve_app.ray_serve import autoscaling, model_client
from serve_app.ray_serve.model_client import CapacityTracker, ModelClient
from serve_app.ray_serve.routing import ReplicaPool, SingleApplicationRoutes
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
    monkeypatch.setattr(model_client, "time", made)
    return made


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int, int]]:
    """What would be written into Ray's store."""
    entries: list[tuple[str, str, int, int]] = []
    monkeypatch.setattr(autoscaling, "publish_demand", lambda *entry: entries.append(entry))
    return entries


def models(pool: ReplicaPool, **serving: Any) -> tuple[CapacityTracker, ModelClient]:
    """A dispatcher's view, with Serve saying this of their deployment."""
    found = ModelClient(SingleApplicationRoutes(cards(**serving), "weft"))
    found.peer_count = 1
    see(found, pool)
    return CapacityTracker(found, 1), found


def see(found: ModelClient, pool: ReplicaPool) -> None:
    found._pools = {"a": pool, "b": pool}
    found._refreshed_at = model_client.time.monotonic()


async def test_the_store_tells_what_waits_and_what_all_dispatchers_run(store: JobStore) -> None:
    for _ in range(3):
        await store.accept(NewJob(new_job_id(), OWNER, resolved()))
    await store.throughput.report("one", {MODEL: Capacity(slots=8, free=3)})
    await store.throughput.report("two", {MODEL: Capacity(slots=8, free=6)})

    assert await store.throughput.demand([MODEL, "other"]) == {MODEL: Demand(3, 7), "other": Demand(0, 0)}
    assert await store.throughput.demand([]) == {}


async def test_models_that_share_replicas_are_told_as_one_and_only_when_it_changes(
    clock: Clock, published: list[tuple[str, str, int, int]]
) -> None:
    capacity, _ = models(ReplicaPool("HEALTHY", running=1), max_replicas=3)
    demand = {"a": Demand(5, 2), "b": Demand(1, 1)}

    await capacity.report_demand(demand)
    await capacity.report_demand(demand)
    assert published == [("weft", "a", 6, 3)]
    clock.now += 11
    await capacity.report_demand(demand)
    assert published == [("weft", "a", 6, 3)] * 2
    await capacity.report_demand({"a": Demand(), "b": Demand()})
    clock.now += 11
    await capacity.report_demand({"a": Demand(), "b": Demand()})  # nothing is told once
    assert published[2:] == [("weft", "a", 0, 0)]


async def test_jobs_of_a_sleeping_model_stay_in_the_store_until_it_runs(
    clock: Clock, published: list[tuple[str, str, int, int]]
) -> None:
    asleep, starting, awake = (
        ReplicaPool("HEALTHY"),
        ReplicaPool("UPSCALING"),
        ReplicaPool("HEALTHY", running=2),
    )
    capacity, found = models(asleep, max_replicas=3)
    assert capacity.free_slots()["a"] == 0
    await capacity.report_demand({"a": Demand(9, 0), "b": Demand()})
    assert published == [("weft", "a", 9, 0)]
    assert capacity.free_slots()["a"] == 0

    clock.now += 3600
    see(found, starting)
    assert capacity.free_slots()["a"] == 0
    see(found, awake)
    assert capacity.free_slots()["a"] == 4 * 3


async def test_a_policy_that_does_not_hear_lets_nobody_wait_for_ever(
    clock: Clock, published: list[tuple[str, str, int, int]]
) -> None:
    capacity, found = models(ReplicaPool("HEALTHY"), max_replicas=3)
    await capacity.report_demand({"a": Demand(9, 0), "b": Demand()})
    clock.now += model_client.WAKE_S + 1
    see(found, ReplicaPool("HEALTHY"))
    assert capacity.free_slots()["a"] == 4
    assert capacity.free_slots()["b"] == 0  # nobody waits for it


async def test_a_model_of_one_replica_is_woken_by_its_first_job(clock: Clock) -> None:
    capacity, _ = models(ReplicaPool("HEALTHY"), max_replicas=1)
    assert capacity.free_slots() == {"a": 4, "b": 4}
