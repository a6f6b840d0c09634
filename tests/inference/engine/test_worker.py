"""The engine's thread as asyncio sees it."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deployments.engine.engine import Engine
from deployments.engine.intercept import intercept
from deployments.engine.scheduled_job import ScheduledJob
from deployments.engine.step_scheduler import StepScheduler
from deployments.engine.work import Checkpointed, Emit, Finished, Work
from deployments.engine.worker import Worker
from deployments.protocol.errors import BadRequest, ModelUnavailable, Overloaded
from deployments.protocol.events import Failed, Queued, Started, Step
from tests.patience import patience


class Gate(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + 1


GATE = Gate()


def worker_of(**options: Any) -> Worker:
    scheduler = StepScheduler(4)
    return Worker(Engine(scheduler), scheduler, **options)


@pytest.fixture
def worker() -> Iterator[Worker]:
    restore = intercept([GATE])
    made = worker_of(slots=2)
    yield made
    made.stop()
    restore()


def steps(count: int, *, pause_after: int = 0, until: threading.Event | None = None) -> Work:
    """So many calls of the gate; holds the worker's thread after one of them until the event."""

    def work(emit: Emit) -> float:
        x = torch.zeros(1)
        for i in range(count):
            x = GATE(x)
            emit(Step(i + 1, count))
            if until is not None and i + 1 == pause_after:
                assert until.wait(patience(2))
        return float(x)

    return work


async def everything(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


async def test_events_come_in_order_and_end_with_the_result(worker: Worker) -> None:
    items = await everything(worker.submit(steps(3), ScheduledJob(steps=3)))

    assert items[:5] == [Queued(0, 0.0), Started(3), Step(1, 3), Step(2, 3), Step(3, 3)]
    assert isinstance(items[-1], Finished)
    assert items[-1].value == 3.0
    assert worker.active == 0


async def test_more_work_than_slots_waits_in_order_of_arrival(worker: Worker) -> None:
    order: list[int] = []

    async def one(i: int) -> None:
        async for item in worker.submit(steps(200), ScheduledJob(steps=200)):
            if isinstance(item, Finished):
                order.append(i)

    await asyncio.gather(*[one(i) for i in range(6)])

    assert set(order[:2]) == {0, 1}
    assert set(order[2:4]) == {2, 3}


async def test_closing_the_iterator_frees_the_slot_at_the_next_step(worker: Worker) -> None:
    endless = worker.submit(steps(10**9), ScheduledJob(steps=1))
    second = worker.submit(steps(10**9), ScheduledJob(steps=1))
    for items in (endless, second):
        async for item in items:
            if isinstance(item, Step):
                break

    await endless.aclose()
    done = await everything(worker.submit(steps(2), ScheduledJob(steps=2)))

    assert isinstance(done[-1], Finished)
    await second.aclose()
    assert worker.active == 0


async def test_a_value_error_of_the_pipeline_is_the_callers_fault(worker: Worker) -> None:
    def refuses(_emit: Emit) -> None:
        raise ValueError("`height` has to be divisible by 8")

    items = await everything(worker.submit(refuses, ScheduledJob(steps=1)))

    assert isinstance(items[-1], Failed)
    assert items[-1].kind == BadRequest.kind
    assert "divisible by 8" in items[-1].message


async def test_stopping_fails_what_runs_as_retryable(worker: Worker) -> None:
    items = worker.submit(steps(10**9), ScheduledJob(steps=1))
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
    worker = worker_of(slots=1)

    items = await everything(worker.submit(steps(1), ScheduledJob(steps=1)))

    assert items[-1].kind == ModelUnavailable.kind
    worker.stop()
    with pytest.raises(ModelUnavailable, match="thread is dead"):
        worker.check()


async def begun(items: AsyncIterator[Any], steps_seen: int = 1) -> None:
    """Read on until so many steps are done."""
    async for item in items:
        if isinstance(item, Step) and item.step >= steps_seen:
            return


async def test_more_important_work_gets_the_next_slot(worker: Worker) -> None:
    order: list[str] = []
    blockers = [worker.submit(steps(10**9), ScheduledJob(steps=1)) for _ in range(2)]
    for blocker in blockers:
        await begun(blocker)

    async def one(name: str, priority: int) -> None:
        async for item in worker.submit(steps(3), ScheduledJob(priority=priority)):
            if isinstance(item, Finished):
                order.append(name)

    tasks = []
    for name, priority in (("low", -1), ("normal", 0), ("high", 1)):
        tasks.append(asyncio.create_task(one(name, priority)))
        await asyncio.sleep(0.02)
    await blockers[0].aclose()
    await asyncio.gather(*tasks)
    await blockers[1].aclose()

    assert order == ["high", "normal", "low"]


async def test_work_that_would_wait_too_long_is_refused_with_a_time_to_come_back(worker: Worker) -> None:
    long = [worker.submit(steps(10**9), ScheduledJob(steps=10**9, shape="s")) for _ in range(2)]
    for items in long:
        await begun(items, 50)

    refused = await everything(worker.submit(steps(1), ScheduledJob(shape="s"), max_wait_s=5.0))
    patient = worker.submit(steps(1), ScheduledJob(shape="s"))
    queued = await anext(patient)

    assert isinstance(refused[-1], Failed)
    assert refused[-1].kind == Overloaded.kind
    assert refused[-1].retry_after_s is not None
    assert refused[-1].retry_after_s > 0
    assert isinstance(queued, Queued)
    assert queued.starts_in_s is not None
    assert queued.starts_in_s > 5.0
    for items in (*long, patient):
        await items.aclose()


async def test_a_draining_worker_preempts_what_would_not_end_in_time(
    worker: Worker,
) -> None:
    orders_given = threading.Event()
    long = worker.submit(steps(10**9), ScheduledJob(steps=10**9, shape="s"), snapshot=lambda: b"state")
    short = worker.submit(steps(60, pause_after=20, until=orders_given), ScheduledJob(steps=60, shape="s"))
    await begun(long, 20)
    await begun(short, 20)
    waiting = worker.submit(steps(1), ScheduledJob(shape="s"))
    queued = asyncio.create_task(anext(waiting))
    await asyncio.sleep(0)  # the order is given; the worker's thread reads it after `orders_given`

    worker.drain(grace_s=30.0)
    orders_given.set()

    assert isinstance(await queued, Queued)
    assert isinstance((await everything(short))[-1], Finished)
    *_, state, failed = await everything(long)
    assert state == Checkpointed(b"state")
    assert failed.retryable
    assert (await everything(waiting))[-1].retryable
    with pytest.raises(ModelUnavailable):
        await anext(worker.submit(steps(1), ScheduledJob()))


async def test_what_a_draining_worker_preempts_is_no_longer_computed(worker: Worker) -> None:
    ended = threading.Event()

    def endless(emit: Emit) -> float:
        try:
            return steps(10**9)(emit)
        finally:
            ended.set()

    items = worker.submit(endless, ScheduledJob(steps=10**9, shape="s"))
    await begun(items)

    worker.drain(grace_s=0.0)

    assert await worker.run_on_thread(ended.is_set), "commands are executed in order"
    assert (await everything(items))[-1].retryable


async def test_a_worker_that_hangs_in_a_forward_is_unhealthy() -> None:
    worker = worker_of(slots=1, watchdog_s=0.2)
    leave = asyncio.Event()
    loop = asyncio.get_running_loop()

    in_it = asyncio.Event()

    def hangs(_emit: Emit) -> None:
        loop.call_soon_threadsafe(in_it.set)
        asyncio.run_coroutine_threadsafe(leave.wait(), loop).result(patience(2))

    worker.check()
    items = worker.submit(hangs, ScheduledJob())
    reading = asyncio.create_task(everything(items))
    await in_it.wait()
    await asyncio.sleep(0.3)
    with pytest.raises(ModelUnavailable, match="stuck"):
        worker.check()

    leave.set()
    await reading
    await worker.run_on_thread(lambda: None)  # it is back at its inbox
    worker.check()
    await asyncio.to_thread(worker.stop)


async def test_a_cancel_while_the_device_computes_is_heard_before_the_next_forward() -> None:
    scheduler = StepScheduler(4)
    engine = Engine(scheduler)
    computing, cancelled = threading.Event(), threading.Event()

    def wait_for_device() -> None:  # as on a GPU, which is a forward behind
        if engine.forwards:
            computing.set()
            assert cancelled.wait(patience(2))

    engine.wait_for_device = wait_for_device  # type: ignore[method-assign]
    restore = intercept([GATE])
    worker = Worker(engine, scheduler, slots=1)
    items = worker.submit(steps(10**9), ScheduledJob())
    await begun(items)
    await asyncio.to_thread(computing.wait, patience(2))

    await items.aclose()
    cancelled.set()

    assert await worker.run_on_thread(lambda: engine.forwards) == 1
    worker.stop()
    restore()


async def test_a_function_runs_between_forwards_and_its_error_is_the_callers(worker: Worker) -> None:
    def broken() -> None:
        raise KeyError("mine")

    running = worker.submit(steps(10**9), ScheduledJob(steps=1))
    await begun(running)

    assert await worker.run_on_thread(lambda: 7) == 7
    with pytest.raises(KeyError):
        await worker.run_on_thread(broken)
    await running.aclose()


class Module(nn.Module):
    """Twice its input; runs out of memory in larger forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, hidden_states: Tensor, timestep: Tensor | None = None) -> Tensor:
        self.seen.append(hidden_states.shape[0])
        if hidden_states.shape[0] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden_states * 2


@pytest.fixture
def module() -> Iterator[Module]:
    made = Module()
    restore = intercept([made])
    yield made
    restore()


def twice(module: Module, steps: int = 1) -> Work:
    def work(_emit: Emit) -> Tensor:
        x = torch.ones(1, 2)
        for _ in range(steps):
            x = module(x, timestep=torch.zeros(1))
        return x

    return work


async def test_batch_sizes_are_tried_when_nothing_waits_and_an_error_fails_no_request(module: Module) -> None:
    scheduler = StepScheduler(8)
    engine = Engine(scheduler, exact="prefer")
    worker = Worker(engine, scheduler, slots=2)

    items = [item async for item in worker.submit(twice(module), ScheduledJob())]
    (proof,) = engine.proofs()
    async with asyncio.timeout(patience(10)):
        while proof.pending:
            await worker.run_on_thread(lambda: None)
            (proof,) = engine.proofs()

    assert isinstance(items[-1], Finished)
    assert (proof.proven, proof.refused) == ((2, 3, 4), (6, 8))
    assert isinstance([item async for item in worker.submit(twice(module), ScheduledJob())][-1], Finished)
    worker.stop()


async def test_warm_up_can_wait_until_batch_sizes_are_proven(module: Module) -> None:
    scheduler = StepScheduler(4)
    engine = Engine(scheduler, exact="strict")
    worker = Worker(engine, scheduler, slots=2)
    async for _ in worker.submit(twice(module), ScheduledJob()):
        pass

    await worker.prove_all(patience(60))

    assert [proof.proven for proof in engine.proofs()] == [(2, 3, 4)]
    assert max(module.seen) == 4
    worker.stop()


@pytest.mark.parametrize("ends_by", ["a cancel", "a failure", "a lack of memory"])
async def test_a_request_that_ends_early_frees_its_tensors_at_once(
    worker: Worker, ends_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when the garbage collector runs: until then they would take memory of the device."""
    monkeypatch.setattr(logging.getLogger("deployments.engine.work"), "disabled", True)  # pytest keeps them
    held: list[weakref.ref[Tensor]] = []
    errors = {
        "a failure": ValueError("it is refused"),
        "a lack of memory": torch.OutOfMemoryError("CUDA out of memory"),
    }

    def work(emit: Emit) -> None:
        latents = torch.zeros(1)
        held.append(weakref.ref(latents))
        for step in range(10**6):
            GATE(latents)
            emit(Step(step + 1, 10**6))
            if ends_by in errors:
                raise errors.pop(ends_by)

    gc.collect()
    gc.disable()
    try:
        last = None
        async with aclosing(worker.submit(work, ScheduledJob())) as items:
            async for item in items:
                last = item
                if ends_by == "a cancel" and isinstance(item, Step):
                    break
        await worker.run_on_thread(lambda: None)
        left = held[0]()
    finally:
        gc.enable()

    assert left is None
    assert isinstance(last, Step if ends_by == "a cancel" else Failed)
