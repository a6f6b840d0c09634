"""Two clusters on one job store, as during an upgrade: which one runs the jobs, and what each asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from deployments.protocol.errors import NotFound
from serve_app.job_ids import new_job_id
from serve_app.jobs.job import COPY_QUEUE, JobState, NewJob
from serve_app.jobs.store.clusters import ClusterRecord, choose_cluster
from serve_app.jobs.store.start_estimate import CAPACITY_TTL_S, Demand, reporting_clusters
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker import cluster_role, dispatch
from serve_app.jobs.worker.cluster_role import ClusterRole
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from tests.serving.fakes import MODEL, OWNER, FakeModels, eventually, keys_without_ttl, resolved
from tests.serving.jobs.conftest import running

OLD = ClusterRecord("old", "0.1.0", "weft-a", since_us=1, seen_us=9, ready=True, stopped=False)
NEW = ClusterRecord("new", "0.2.0", "weft-b", since_us=2, seen_us=9, ready=True, stopped=False)


class Cluster:
    """One cluster: a dispatcher on models of its own, and the demand that its autoscaler sees."""

    def __init__(
        self, store: JobStore, results: ResultStore, settings: Settings, name: str, slots: Mapping[str, int]
    ) -> None:
        self.ready = True
        self.demand: dict[str, Demand] = {}
        self.models = FakeModels(slots)
        self.models.gate.clear()
        self.role = ClusterRole(store, name, release="0.1.0", place="here", is_ready=lambda: self.ready)
        self.dispatcher = Dispatcher(
            store, results, self.models, settings, report_demand=self.keep_demand, role=self.role
        )

    async def keep_demand(self, demand: Mapping[str, Demand]) -> None:
        self.demand = dict(demand)


def may(cluster: Cluster, queue: str = MODEL) -> bool:
    """Whether this cluster claims from the queue, as its dispatcher last read."""
    return cluster.role.may_claim(queue)


@pytest.fixture(autouse=True)
def quick_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "POLL_S", 0.02)
    monkeypatch.setattr(cluster_role, "UPDATE_EVERY_S", 0.02)


@pytest.fixture
def old(store: JobStore, results: ResultStore, settings: Settings) -> Cluster:
    return Cluster(store, results, settings, "app@old", {MODEL: 2})


@pytest.fixture
def new(store: JobStore, results: ResultStore, settings: Settings) -> Cluster:
    return Cluster(store, results, settings, "app@new", {MODEL: 2})


async def submit(store: JobStore, count: int, model: str = MODEL) -> list[str]:
    jobs = [NewJob(new_job_id(), OWNER, resolved(f"picture {n}", model=model)) for n in range(count)]
    return [(await store.accept(job)).id for job in jobs]


async def states(store: JobStore, ids: list[str]) -> list[JobState]:
    return [(await store.get(job_id)).state for job_id in ids]


async def completed(store: JobStore, ids: list[str]) -> bool:
    return set(await states(store, ids)) == {JobState.completed}


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        ([], None),
        ([OLD], "old"),
        ([OLD, NEW], "new"),
        ([OLD, replace(NEW, ready=False)], "old"),  # it may never become ready
        ([replace(OLD, ready=False), replace(NEW, ready=False)], "old"),
        ([replace(OLD, since_us=3), NEW], "old"),  # asked to take over again
        ([OLD, replace(NEW, stopped=True)], "old"),
        ([replace(OLD, stopped=True), replace(NEW, ready=False)], "new"),
        ([replace(OLD, stopped=True)], None),
    ],
)
def test_the_newest_cluster_that_is_ready_is_chosen(
    candidates: list[ClusterRecord], chosen: str | None
) -> None:
    assert choose_cluster(candidates) == chosen
    assert choose_cluster(reversed(candidates)) == chosen


def test_a_cluster_without_a_fresh_report_serves_nothing() -> None:
    reports = {"app@old:1": "2 1 100", "app@new:2": f"2 1 {100 + CAPACITY_TTL_S}", "3": "2 1 115"}

    assert reporting_clusters(reports, 101 + CAPACITY_TTL_S) == {"app@new"}


async def test_a_newer_cluster_takes_the_queue_and_both_ask_for_what_one_would(
    store: JobStore, old: Cluster, new: Cluster
) -> None:
    ids = await submit(store, 2)
    async with running(old.dispatcher):
        await eventually(lambda: old.models.running == 2)
        ids += await submit(store, 3)
        await eventually(lambda: old.demand == {MODEL: Demand(3, 2)})

        async with running(new.dispatcher):
            await eventually(lambda: new.models.running == 2)
            await eventually(lambda: old.demand == {MODEL: Demand(0, 2)})  # nothing to scale up for
            await eventually(lambda: new.demand == {MODEL: Demand(1, 2)})
            old.models.gate.set()  # what it runs ends there, and it takes nothing more
            await eventually(lambda: old.models.running == 0)
            await eventually(lambda: old.demand == {MODEL: Demand(0, 0)})
            assert new.models.running == 2
            new.models.gate.set()

            await eventually(lambda: completed(store, ids))

    assert len(old.models.requests) == 2
    assert len(new.models.requests) == 3


async def test_a_cluster_that_is_not_ready_takes_nothing_from_the_one_before(
    store: JobStore, old: Cluster, new: Cluster
) -> None:
    new.ready = False
    old.models.gate.set()
    async with running(old.dispatcher):
        await eventually(lambda: may(old))
        async with running(new.dispatcher):
            await eventually(lambda: MODEL in new.demand)  # it has reported, and read that it waits
            ids = await submit(store, 4)
            await eventually(lambda: len(old.models.requests) == 4)
            assert new.demand == {MODEL: Demand(0, 0)}
            assert new.models.requests == []

            new.ready = True
            new.models.gate.set()
            await eventually(lambda: may(new) and not may(old))
            ids += await submit(store, 1)
            await eventually(lambda: completed(store, ids))

    assert len(old.models.requests) == 4


async def test_rolling_back_gives_the_queue_to_the_old_cluster_and_loses_no_job(
    store: JobStore, old: Cluster, new: Cluster
) -> None:
    async with running(old.dispatcher):
        await eventually(lambda: may(old))
        async with running(new.dispatcher):
            await eventually(lambda: may(new) and not may(old))
            ids = await submit(store, 4)
            await eventually(lambda: new.models.running == 2)

            await store.clusters.use("app@old")
            await eventually(lambda: old.models.running == 2 and not may(new))
            assert new.models.running == 2
        # the new cluster is gone: what it ran is queued again
        old.models.gate.set()

        await eventually(lambda: completed(store, ids))


async def test_a_cluster_that_leaves_gives_the_queue_back_at_once(
    store: JobStore, old: Cluster, new: Cluster
) -> None:
    async with running(old.dispatcher):
        await eventually(lambda: may(old))
        async with running(new.dispatcher):
            await eventually(lambda: may(new) and not may(old))
        await eventually(lambda: may(old))

    assert await store.throughput.clusters_of([MODEL, COPY_QUEUE]) == {MODEL: set(), COPY_QUEUE: set()}


async def test_a_cluster_that_was_stopped_claims_nothing_until_it_is_used_again(
    store: JobStore, old: Cluster
) -> None:
    old.models.gate.set()
    async with running(old.dispatcher):
        await eventually(lambda: may(old))
        await store.clusters.stop("app@old")
        await eventually(lambda: not may(old))
        ids = await submit(store, 1)
        await eventually(lambda: old.demand == {MODEL: Demand(0, 0)})
        assert await states(store, ids) == [JobState.queued]

        await store.clusters.use("app@old")
        await eventually(lambda: len(old.models.requests) == 1)

    with pytest.raises(NotFound, match="weft clusters list"):
        await store.clusters.stop("app@none")


async def test_each_cluster_keeps_the_models_that_only_it_serves(
    store: JobStore, results: ResultStore, settings: Settings
) -> None:
    first = Cluster(store, results, settings, "app@first", {"a": 1, "b": 1})
    second = Cluster(store, results, settings, "app@second", {"b": 1, "c": 1})
    async with running(first.dispatcher):
        await eventually(lambda: may(first, "a") and may(first, "b"))
        async with running(second.dispatcher):
            await eventually(lambda: may(first, "a") and not may(first, "b"))
            for model in ("a", "b", "c"):
                await submit(store, 1, model)
            await eventually(lambda: first.models.running == 1 and second.models.running == 2)

            assert [first.models.running_of[model] for model in "abc"] == [1, 0, 0]
            first.models.gate.set()
            second.models.gate.set()
            await eventually(lambda: first.models.running + second.models.running == 0)


async def test_dispatchers_of_one_cluster_share_its_queue(
    store: JobStore, results: ResultStore, settings: Settings
) -> None:
    pair = [Cluster(store, results, settings, "app@one", {MODEL: 1}) for _ in range(2)]
    async with running(pair[0].dispatcher), running(pair[1].dispatcher):
        await eventually(lambda: all(may(one) for one in pair))
        await submit(store, 3)

        await eventually(lambda: all(one.demand == {MODEL: Demand(1, 2)} for one in pair))

        for one in pair:
            one.models.gate.set()
        await eventually(lambda: sum(len(one.models.requests) for one in pair) == 3)


async def test_records_of_clusters_expire(
    store: JobStore, redis: Redis, settings: Settings, old: Cluster
) -> None:
    async with running(old.dispatcher):
        await eventually(lambda: may(old))

    (record,) = await store.clusters.all()
    assert (record.id, record.ready, record.stopped) == ("app@old", True, False)
    assert not [key for key in await keys_without_ttl(redis, settings.redis_prefix) if "cluster" in key]
