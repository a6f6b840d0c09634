"""Branches of a fiber: they share forwards, what they need alike is computed once, and they end together."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deployments.engine.branches import SharedResults, run_branches
from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber, FiberCancelled, current_fiber, use_exactness, use_lora_set
from deployments.engine.intercept import intercept
from deployments.engine.scheduled_job import ScheduledJob
from deployments.engine.step_scheduler import StepScheduler
from deployments.engine.work import Checkpointed, Emit, Finished
from deployments.engine.worker import Worker
from deployments.protocol.events import Failed
from tests.inference.engine.together import Together


class Doubled(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if bool((hidden_states < 0).any()):
            raise RuntimeError("a negative row")
        return hidden_states * 2


DOUBLED = Doubled()


@pytest.fixture(autouse=True)
def _intercepted() -> Iterator[None]:
    restore = intercept([DOUBLED])
    yield
    restore()


def doublings(start: float, count: int) -> Callable[[], float]:
    def call() -> float:
        x = torch.tensor([start])
        for _ in range(count):
            x = DOUBLED(x)
        return float(x)

    return call


def play(engine: Engine, *fibers: Fiber) -> None:
    for fiber in fibers:
        engine.start(fiber)
    while not engine.idle:
        engine.step()


def test_branches_share_every_forward_and_answer_in_their_order() -> None:
    engine = Engine(Together(8))
    fiber = Fiber(lambda: run_branches([doublings(start, 3) for start in (1.0, 3.0, 2.0)]))
    other = Fiber(doublings(5.0, 3))

    play(engine, fiber, other)

    assert (fiber.result, other.result) == ([8.0, 24.0, 16.0], 40.0)
    assert (engine.forwards, engine.rows) == (3, 12)


def test_branches_of_different_lengths_wait_for_the_last() -> None:
    fiber = Fiber(lambda: sum(run_branches([doublings(1.0, 1), doublings(1.0, 4), lambda: 0.5])))

    play(Engine(Together(8)), fiber)

    assert fiber.result == 18.5


def test_a_branch_has_the_settings_of_its_fiber_and_a_job_of_one_picture() -> None:
    seen: list[Any] = []
    name: ContextVar[str] = ContextVar("name")

    def look() -> None:
        branch = current_fiber()
        assert branch is not None
        seen.append((branch.lora_set, branch.exact, branch.job.batch_size, branch.job.request, name.get()))

    def call() -> None:
        name.set("ada")
        use_lora_set("a style")
        use_exactness("strict")
        run_branches([look, look])

    job = ScheduledJob(user="ada", batch_size=2)
    fiber = Fiber(call, job)
    play(Engine(Together(8)), fiber)

    assert fiber.failure is None
    assert seen == [("a style", "strict", 1, job, "ada")] * 2


def test_the_first_failure_is_the_fibers_and_ends_the_other_branches() -> None:
    engine, ended = Engine(Together(8)), []

    def endless() -> None:
        try:
            doublings(1.0, 10**6)()
        except FiberCancelled:
            ended.append("endless")
            raise

    fiber = Fiber(lambda: run_branches([endless, doublings(-1.0, 1), endless]))
    bystander = Fiber(doublings(1.0, 3))
    play(engine, fiber, bystander)

    assert "a negative row" in str(fiber.failure)
    assert ended == ["endless"] * 2
    assert bystander.result == 8.0


def test_cancelling_the_fiber_ends_its_branches_and_leaves_nothing_waiting() -> None:
    engine, shared = Engine(Together(8)), SharedResults()

    def call() -> float:
        return shared.get("prompt", doublings(1.0, 10**6))

    fiber = Fiber(lambda: run_branches([call, call, doublings(1.0, 10**6)]))
    engine.start(fiber)
    engine.step()

    engine.cancel(fiber)

    assert isinstance(fiber.failure, FiberCancelled)
    assert engine.idle


@pytest.mark.parametrize("end", ["done", "failed", "cancelled"])
def test_what_branches_hold_is_free_when_their_fiber_is_without_the_garbage_collector(end: str) -> None:
    engine, held = Engine(Together(8)), torch.ones(1)
    freed = weakref.ref(held)

    def call(held: Tensor = held) -> float:
        return float(held) * doublings(-1.0 if end == "failed" else 1.0, 3)()

    fiber: Fiber | None = Fiber(partial(run_branches, [call, partial(call, held)]))
    del call, held
    assert fiber is not None
    gc.disable()
    try:
        engine.start(fiber)
        if end == "cancelled":
            engine.cancel(fiber)
        while not engine.idle:
            engine.step()
        assert fiber.done
        fiber.release_frames()
        fiber = None
        engine.step()
        assert freed() is None
    finally:
        gc.enable()


def test_what_branches_need_alike_is_computed_once_and_none_is_a_step_behind() -> None:
    engine, shared = Engine(Together(8)), SharedResults()

    def call(start: float) -> float:
        x = torch.tensor([start]) + shared.get("prompt", doublings(1.0, 2))
        return float(DOUBLED(DOUBLED(x)))

    fiber = Fiber(lambda: run_branches([lambda start=start: call(start) for start in (0.0, 1.0, 2.0)]))
    play(engine, fiber)

    assert fiber.result == [16.0, 20.0, 24.0]
    assert (engine.forwards, engine.rows) == (4, 2 + 2 * 3)


def test_a_failed_computation_is_tried_by_the_next_that_needs_it() -> None:
    shared, tries = SharedResults(), list[int]()

    def compute() -> float:
        tries.append(1)
        return doublings(1.0 if len(tries) > 1 else -1.0, 1)()

    def call() -> float:
        try:
            return shared.get("prompt", compute)
        except RuntimeError:
            return 0.0

    fiber = Fiber(lambda: run_branches([call] * 3))
    play(Engine(Together(8)), fiber)

    assert fiber.result == [0.0, 2.0, 2.0]
    assert len(tries) == 2


@pytest.fixture
def worker() -> Iterator[Worker]:
    scheduler = StepScheduler(8)
    made = Worker(Engine(scheduler, auxiliary_lane=True), scheduler, slots=1)
    yield made
    made.stop()


async def test_a_request_of_branches_takes_one_slot_and_frees_it_however_it_ends(worker: Worker) -> None:
    def work_of(*starts: float, steps: int = 3) -> Callable[[Emit], list[float]]:
        return lambda _emit: run_branches([doublings(start, steps) for start in starts])

    async def last(work: Callable[[Emit], Any]) -> Any:
        return [item async for item in worker.submit(work, ScheduledJob(batch_size=2))][-1]

    done, failed, again = await asyncio.gather(
        last(work_of(1.0, 2.0)), last(work_of(1.0, -2.0)), last(work_of(4.0, 5.0))
    )
    endless = worker.submit(work_of(1.0, 1.0, steps=10**9), ScheduledJob())
    await anext(endless)
    await endless.aclose()
    after = await last(work_of(1.0, 1.0))

    assert isinstance(failed, Failed)
    for item, value in ((done, [8.0, 16.0]), (again, [32.0, 40.0]), (after, [8.0, 8.0])):
        assert isinstance(item, Finished)
        assert item.value == value
    assert worker.active == 0
    assert worker.load == (0, 0)


async def test_a_drained_request_of_branches_is_handed_over_with_its_state(worker: Worker) -> None:
    items = worker.submit(
        lambda _emit: run_branches([doublings(1.0, 10**9)] * 2), ScheduledJob(), snapshot=lambda: "state"
    )
    got = [await anext(items), await anext(items)]
    worker.drain(0.0)
    got += [item async for item in items]

    assert Checkpointed("state") in got
    assert isinstance(got[-1], Failed)
