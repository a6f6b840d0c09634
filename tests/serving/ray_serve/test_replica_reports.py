"""Reports of replicas: asked for seldom, never waited for long."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from serve_app.ray_serve import replica_reports
from serve_app.ray_serve.replica_reports import ProofReport, ReplicaReports
from tests.patience import patience
from tests.serving.fakes import eventually

REPORT = {"module": "UNet.forward", "proven": (2, 4)}


class Replicas:
    """One replica per model; those in `away` have none, and while `gate` is closed none answers."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.away: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()

    async def ask(self, model: str) -> Sequence[ProofReport] | None:
        self.asked.append(model)
        await self.gate.wait()
        return None if model in self.away else [REPORT]


async def test_each_model_has_the_report_of_its_replica_and_none_without_one() -> None:
    replicas = Replicas()
    replicas.away = {"asleep"}

    found = await ReplicaReports(replicas.ask).of(["awake", "asleep"])

    assert found == {"awake": [REPORT], "asleep": None}


@pytest.mark.parametrize(("max_age_s", "asked"), [(60.0, ["a"]), (-1.0, ["a"] * 3)])
async def test_a_young_report_is_not_asked_for_again(max_age_s: float, asked: list[str]) -> None:
    replicas = Replicas()
    reports = ReplicaReports(replicas.ask, max_age_s)

    for _ in range(3):
        await reports.of(["a"])

    assert replicas.asked == asked


async def test_callers_at_once_share_one_question() -> None:
    replicas = Replicas()
    reports = ReplicaReports(replicas.ask)

    found = await asyncio.gather(*(reports.of(["a"]) for _ in range(8)))

    assert replicas.asked == ["a"]
    assert found == [{"a": [REPORT]}] * 8


async def test_a_silent_replica_delays_no_caller_and_its_previous_answer_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replicas = Replicas()
    reports = ReplicaReports(replicas.ask, -1.0)
    await reports.of(["a"])
    monkeypatch.setattr(replica_reports, "PATIENCE_S", 0.01)
    replicas.gate.clear()

    assert await reports.of(["a", "b"]) == {"a": [REPORT], "b": None}

    replicas.gate.set()
    monkeypatch.setattr(replica_reports, "PATIENCE_S", patience())

    async def has_answered() -> bool:
        return await reports.of(["b"]) == {"b": [REPORT]}

    await eventually(has_answered)


async def test_a_caller_that_leaves_does_not_end_the_question_of_others() -> None:
    replicas = Replicas()
    reports = ReplicaReports(replicas.ask)
    replicas.gate.clear()
    leaving = asyncio.create_task(reports.of(["a"]))
    staying = asyncio.create_task(reports.of(["a"]))
    await eventually(lambda: replicas.asked == ["a"])

    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    replicas.gate.set()

    assert await staying == {"a": [REPORT]}
    assert replicas.asked == ["a"]
