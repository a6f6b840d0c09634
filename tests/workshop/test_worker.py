"""The engine's thread as asyncio sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deployments.engine.engine import Engine
from deployments.engine.intercept import intercept
from deployments.engine.step_scheduler import StepScheduler
from deployments.engine.worker import Emit, Finished, Work, Worker
from deployments.protocol.errors import BadRequest, ModelUnavailable
from deployments.protocol.events import Failed, Queued, Started, Step


class Gate(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + 1


GATE = Gate()


@pytest.fixture
def worker() -> Iterator[Worker]:
    restore = intercept([GATE])
    made = Worker(Engine(StepScheduler(4)), slots=2)
    yield made
    made.stop()
    restore()


def steps(count: int) -> Work:
    def work(emit: Emit) -> float:
        x = torch.zeros(1)
        for i in range(count):
            x = GATE(x)
            emit(Step(i + 1, count))
        return float(x)

    return work


async def everything(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


async def test_events_come_in_order_and_end_with_the_result(worker: Worker) -> None:
    items = await everything(worker.submit(steps(3), steps=3))

    assert items[:5] == [Queued(0), Started(3), Step(1, 3), Step(2, 3), Step(3, 3)]
    assert isinstance(items[-1], Finished)
    assert items[-1].value == 3.0
    assert worker.active == 0


async def test_more_work_than_slots_waits_in_order_of_arrival(worker: Worker) -> None:
    order: list[int] = []

    async def one(i: int) -> None:
        async for item in worker.submit(steps(200), steps=200):
            if isinstance(item, Finished):
                order.append(i)

    await asyncio.gather(*[one(i) for i in range(6)])

    assert set(order[:2]) == {0, 1}
    assert set(order[2:4]) == {2, 3}


async def test_closing_the_iterator_frees_the_slot_at_the_next_step(worker: Worker) -> None:
    endless = worker.submit(steps(10**9), steps=1)
    second = worker.submit(steps(10**9), steps=1)
    for items in (endless, second):
        async for item in items:
            if isinstance(item, Step):
                break

    await endless.aclose()
    done = await everything(worker.submit(steps(2), steps=2))

    assert isinstance(done[-1], Finished)
    await second.aclose()
    assert worker.active == 0


async def test_a_value_error_of_the_pipeline_is_the_callers_fault(worker: Worker) -> None:
    def refuses(_emit: Emit) -> None:
        raise ValueError("`height` has to be divisible by 8")

    items = await everything(worker.submit(refuses, steps=1))

    assert isinstance(items[-1], Failed)
    assert items[-1].kind == BadRequest.kind
    assert "divisible by 8" in items[-1].message


async def test_stopping_fails_what_runs_as_retryable(worker: Worker) -> None:
    items = worker.submit(steps(10**9), steps=1)
    async for item in items:
        if isinstance(item, Step):
            break

    await asyncio.to_thread(worker.stop)
    rest = await everything(items)

    assert isinstance(rest[-1], Failed)
    assert rest[-1].retryable
    with pytest.raises(ModelUnavailable):
        worker.check()


async def test_a_dead_thread_is_seen_by_the_health_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(_self: Engine, _fiber: object) -> None:
        raise SystemError("the device fell off the bus")

    monkeypatch.setattr(Engine, "start", explode)
    worker = Worker(Engine(StepScheduler(4)), slots=1)

    items = await everything(worker.submit(steps(1), steps=1))

    assert items[-1].kind == ModelUnavailable.kind
    worker.stop()
    with pytest.raises(ModelUnavailable, match="thread is dead"):
        worker.check()
