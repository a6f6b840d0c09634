"""Heartbeats of a running job: in time, with its events, and through outages (no server)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from deployments.protocol.errors import Overloaded
from serve_app.jobs import events
from serve_app.jobs.job import Job, JobState, ResumePoint
from serve_app.jobs.store.leases import Claim, StaleClaim
from serve_app.jobs.worker import lease_keeper
from serve_app.jobs.worker.lease_keeper import (
    OUTAGE_FIRST_S,
    OUTAGE_MAX_S,
    PENDING_EVENTS_KEPT,
    AbortReason,
    LeaseKeeper,
    outage_pauses,
)
from serve_app.redis.transactions import StoreUnreachable
from tests.patience import patience
from tests.serving.fakes import OWNER, eventually, resolved

CLAIM = Claim(Job("a" * 32, OWNER, JobState.processing, resolved(), 0.0, attempt=1))
AWAY = StoreUnreachable("away")


class FakeLeases:
    """Takes heartbeats. `answers`: what the next ones come to, one each; then False."""

    def __init__(self, *answers: bool | Exception) -> None:
        self.answers = list(answers)
        self.beats: list[tuple[int, int, list[events.Event]]] = []  # the successful ones
        self.calls = 0
        self.before_answer: Callable[[], None] = lambda: None
        self.resume_points: list[ResumePoint | None] = []

    async def heartbeat(
        self,
        claim: Claim,
        *,
        step: int,
        steps: int,
        pending_events: Sequence[events.Event],
        resume_point: ResumePoint | None,
        device_us: int,
    ) -> bool:
        assert claim is CLAIM
        self.calls += 1
        self.before_answer()
        answer = self.answers.pop(0) if self.answers else False
        if isinstance(answer, Exception):
            raise answer
        self.beats.append((step, steps, list(pending_events)))
        self.resume_points.append(resume_point)
        return answer

    @property
    def published(self) -> list[events.Event]:
        return [event for _, _, sent in self.beats for event in sent]


class Kept:
    """A keeper at work over fake leases."""

    def __init__(self, leases: FakeLeases, heartbeat_s: float = 60.0) -> None:
        self.leases = leases
        self.reasons: list[AbortReason] = []
        self.wakeup = asyncio.Event()
        self.keeper = LeaseKeeper(CLAIM, cast(Any, leases), heartbeat_s, self.wakeup, self.reasons.append)
        self.task = asyncio.create_task(self.keeper.keep())

    async def close(self) -> None:
        self.keeper.close()
        await asyncio.wait_for(self.task, patience())


@pytest.fixture(autouse=True)
def short_outages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_keeper, "OUTAGE_FIRST_S", 0.001)
    monkeypatch.setattr(lease_keeper, "OUTAGE_MAX_S", 0.004)


async def test_events_are_published_at_once_with_the_progress() -> None:
    kept = Kept(FakeLeases())

    kept.keeper.record_step(1, 4)
    kept.keeper.publish(events.Stage("decode", 1, 9))
    await eventually(lambda: kept.leases.beats != [])
    await kept.close()

    assert kept.leases.beats == [(1, 4, [events.Step(1, 4), events.Stage("decode", 1, 9)])]
    assert kept.reasons == []


async def test_a_step_that_goes_back_is_published_as_the_furthest() -> None:
    kept = Kept(FakeLeases())

    kept.keeper.record_step(3, 4)
    kept.keeper.record_step(1, 4)
    await kept.close()

    assert kept.leases.published == [events.Step(3, 4), events.Step(3, 4)]


async def test_a_resume_point_is_recorded_once_and_after_an_outage_too() -> None:
    kept = Kept(FakeLeases(AWAY), heartbeat_s=0.01)
    point = ResumePoint("inputs/x", "0" * 64, 2, 4, 1)

    kept.keeper.record_resume_point(point)
    assert kept.keeper.resume_point is None, "not before the store has it"
    await eventually(lambda: len(kept.leases.beats) >= 2)
    await kept.close()

    assert kept.keeper.resume_point == point
    assert kept.leases.resume_points[:2] == [point, None]


async def test_the_lease_is_renewed_in_time_when_nothing_happens() -> None:
    kept = Kept(FakeLeases(), heartbeat_s=0.01)

    await eventually(lambda: len(kept.leases.beats) >= 3)
    await kept.close()

    assert kept.leases.published == []


@pytest.mark.parametrize("outage", [AWAY, Overloaded("full")])
async def test_events_of_an_outage_are_published_after_it_in_order(outage: Exception) -> None:
    leases = FakeLeases(outage, outage, outage)
    kept = Kept(leases)
    more = iter([2, 3, 4])
    leases.before_answer = lambda: kept.keeper.record_step(step, 9) if (step := next(more, 0)) else None

    kept.keeper.record_step(1, 9)
    await eventually(lambda: leases.calls >= 4)
    await kept.close()

    assert leases.published == [events.Step(step, 9) for step in (1, 2, 3, 4)]
    assert kept.reasons == []


async def test_closing_during_an_outage_still_publishes_what_is_pending() -> None:
    leases = FakeLeases(*[AWAY] * 10)
    kept = Kept(leases)

    kept.keeper.record_step(4, 4)
    await eventually(lambda: leases.calls > 0)
    await kept.close()

    assert leases.published == [events.Step(4, 4)]


async def test_a_long_outage_keeps_a_bounded_number_of_events() -> None:
    leases = FakeLeases(AWAY)
    kept = Kept(leases)
    sent = [events.Step(step, 999) for step in range(PENDING_EVENTS_KEPT)]

    def two_more() -> None:
        if leases.calls == 1:
            kept.keeper.publish(events.Stage("decode", 1, 2))
            kept.keeper.publish(events.Stage("decode", 2, 2))

    leases.before_answer = two_more
    for event in sent:
        kept.keeper.publish(event)
    await eventually(lambda: leases.beats != [])
    await kept.close()

    stages = [events.Stage("decode", 1, 2), events.Stage("decode", 2, 2)]
    assert leases.published == [*sent[:-2], *stages], "the events before the outage and the latest ones"


async def test_a_requested_cancellation_aborts_the_attempt_and_the_lease_is_kept() -> None:
    kept = Kept(FakeLeases(True), heartbeat_s=0.01)

    await eventually(lambda: len(kept.leases.beats) >= 2)
    await kept.close()

    assert kept.reasons == [AbortReason.cancelled]


async def test_a_stale_claim_aborts_the_attempt_and_ends_the_heartbeats() -> None:
    kept = Kept(FakeLeases(StaleClaim("another has it")), heartbeat_s=0.01)

    await asyncio.wait_for(kept.task, patience())

    assert kept.reasons == [AbortReason.stale_claim]
    assert kept.leases.calls == 1


async def test_a_wakeup_without_events_sends_a_heartbeat_at_once() -> None:
    kept = Kept(FakeLeases())

    kept.wakeup.set()
    await eventually(lambda: kept.leases.beats != [])
    await kept.close()

    assert kept.leases.beats == [(0, 0, [])]


async def test_closing_sends_no_heartbeat_when_nothing_is_pending() -> None:
    kept = Kept(FakeLeases())
    await asyncio.sleep(0)

    await kept.close()

    assert kept.leases.calls == 0


def test_pauses_of_an_outage_double_up_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pauses = outage_pauses()

    assert [next(pauses) for _ in range(7)] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert (OUTAGE_FIRST_S, OUTAGE_MAX_S) == (0.05, 1.0)


async def test_events_published_during_an_outage_are_bounded_to_the_latest() -> None:
    leases = FakeLeases(AWAY)
    kept = Kept(leases)
    many = [events.Step(step, 999) for step in range(2 * PENDING_EVENTS_KEPT)]
    for event in many:
        kept.keeper.publish(event)

    await eventually(lambda: leases.beats != [])
    await kept.close()

    assert leases.published == many[-PENDING_EVENTS_KEPT:]


async def test_a_second_outage_is_survived_like_the_first() -> None:
    leases = FakeLeases(AWAY, False, AWAY, AWAY)
    kept = Kept(leases, heartbeat_s=0.001)

    await eventually(lambda: leases.calls >= 5)
    await kept.close()

    assert kept.reasons == []
