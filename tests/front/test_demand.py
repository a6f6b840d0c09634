"""What dispatchers tell the autoscaling policy, and what they hold back meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.protocol.card import ModelCard, Serving
from serve_app import autoscaling, handles
from serve_app.handles import DispatcherModels, ModelHandles
from serve_app.jobs.forecast import Room
from serve_app.jobs.job import new_job_id
from serve_app.jobs.pace import Demand
from serve_app.jobs.store import JobStore
from serve_app.places import OneApplication, Pool
from tests.front.fakes import CARD, MODEL, OWNER, fitted


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
    monkeypatch.setattr(handles, "time", made)
    return made


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int, int]]:
    """What would be written into Ray's store."""
    words: list[tuple[str, str, int, int]] = []
    monkeypatch.setattr(autoscaling, "tell", lambda *word: words.append(word))
    return words


def models(pool: Pool, **serving: Any) -> tuple[DispatcherModels, ModelHandles]:
    """A dispatcher's view, with Serve saying this of their deployment."""
    found = ModelHandles(OneApplication(cards(**serving), "weft"))
    found.siblings = 1
    see(found, pool)
    return DispatcherModels(found, 1), found


def see(found: ModelHandles, pool: Pool) -> None:
    found._pools = {"a": pool, "b": pool}
    found._looked_at = handles.time.monotonic()


async def test_the_store_tells_what_waits_and_what_all_dispatchers_run(store: JobStore) -> None:
    for _ in range(3):
        await store.accept(new_job_id(), OWNER, fitted())
    await store.tell_room("one", {MODEL: Room(slots=8, free=3)})
    await store.tell_room("two", {MODEL: Room(slots=8, free=6)})

    assert await store.demand([MODEL, "other"]) == {MODEL: Demand(3, 7), "other": Demand(0, 0)}
    assert await store.demand([]) == {}


async def test_models_that_share_replicas_are_told_as_one_and_only_when_it_changes(
    clock: Clock, told: list[tuple[str, str, int, int]]
) -> None:
    room, _ = models(Pool("HEALTHY", running=1), max_replicas=3)
    demand = {"a": Demand(5, 2), "b": Demand(1, 1)}

    await room.tell_demand(demand)
    await room.tell_demand(demand)
    assert told == [("weft", "a", 6, 3)]
    clock.now += 11
    await room.tell_demand(demand)
    assert told == [("weft", "a", 6, 3)] * 2
    await room.tell_demand({"a": Demand(), "b": Demand()})
    clock.now += 11
    await room.tell_demand({"a": Demand(), "b": Demand()})  # nothing is told once
    assert told[2:] == [("weft", "a", 0, 0)]


async def test_jobs_of_a_sleeping_model_stay_in_the_store_until_it_runs(
    clock: Clock, told: list[tuple[str, str, int, int]]
) -> None:
    asleep, starting, awake = Pool("HEALTHY"), Pool("UPSCALING"), Pool("HEALTHY", running=2)
    room, found = models(asleep, max_replicas=3)
    assert room.free_slots()["a"] == 0
    await room.tell_demand({"a": Demand(9, 0), "b": Demand()})
    assert told == [("weft", "a", 9, 0)]
    assert room.free_slots()["a"] == 0

    clock.now += 3600
    see(found, starting)
    assert room.free_slots()["a"] == 0
    see(found, awake)
    assert room.free_slots()["a"] == 4 * 3


async def test_a_policy_that_does_not_hear_lets_nobody_wait_for_ever(
    clock: Clock, told: list[tuple[str, str, int, int]]
) -> None:
    room, found = models(Pool("HEALTHY"), max_replicas=3)
    await room.tell_demand({"a": Demand(9, 0), "b": Demand()})
    clock.now += handles.WAKE_S + 1
    see(found, Pool("HEALTHY"))
    assert room.free_slots()["a"] == 4
    assert room.free_slots()["b"] == 0  # nobody waits for it


async def test_a_model_of_one_replica_is_woken_by_its_first_job(clock: Clock) -> None:
    room, _ = models(Pool("HEALTHY"), max_replicas=1)
    assert room.free_slots() == {"a": 4, "b": 4}
