"""Fibers keep out of each other's way: errors, cancels, memory, values shared by a batch."""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from collections.abc import Callable, Iterator
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deployments.engine.batch_buckets import BucketProver
from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber, FiberCancelled, current_fiber, use_exactness, use_lora_set
from deployments.engine.intercept import intercept
from deployments.engine.lora_rows import current_lora_rows
from deployments.protocol.errors import OutOfMemory
from tests.inference.engine.together import Together


class Denoiser(nn.Module):
    """hidden_states x 2 + timestep + sum(img_ids); notes the rows of every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.max_rows = 10**6  # rows that fit "the device"

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        img_ids: Tensor | None = None,
        scale: float = 1.0,
        strange: Any = None,
    ) -> tuple[Tensor]:
        rows = hidden_states.shape[0]
        self.seen.append(rows)
        if rows > self.max_rows:
            raise torch.OutOfMemoryError(f"{rows} rows")
        if bool((hidden_states == 13).any()):
            raise ArithmeticError("thirteen")
        ids = img_ids.sum() if img_ids is not None else 0
        return (hidden_states * 2 * scale + timestep.reshape(-1, 1) + ids,)


@pytest.fixture
def denoiser() -> Iterator[Denoiser]:
    module = Denoiser()
    restore = intercept([module])
    yield module
    restore()


def loop(module: Denoiser, value: float, steps: int = 3, rows: int = 1, **extra: Any) -> Callable[[], Tensor]:
    """A pipeline in small: `steps` calls, each fed with the last one's answer."""

    def call() -> Tensor:
        x = torch.full((rows, 2), value)
        for step in range(steps):
            x = module(x, torch.tensor(float(step)), **extra)[0]
        return x

    return call


def run(engine: Engine, works: list[Callable[[], Any]]) -> list[Fiber]:
    fibers = [Fiber(work) for work in works]
    for fiber in fibers:
        engine.start(fiber)
    while not engine.idle:
        engine.step()
    return fibers


def test_calls_of_many_fibers_share_forwards(denoiser: Denoiser) -> None:
    fibers = run(Engine(Together(8)), [loop(denoiser, float(i), steps=2 + i) for i in range(3)])

    assert [float(f.result[0, 0]) for f in fibers] == [
        float(loop(denoiser, float(i), steps=2 + i)()[0, 0]) for i in range(3)
    ]
    assert denoiser.seen[:4] == [3, 3, 2, 1]


def test_while_requests_wait_trials_take_at_most_a_third_of_the_rows(denoiser: Denoiser) -> None:
    engine = Engine(Together(1), exact="prefer")
    fibers = [Fiber(loop(denoiser, float(i), steps=40)) for i in range(2)]
    engine._steps._prover = BucketProver(8, "prefer", lambda _key: None)  # larger sizes than the scheduler's
    for fiber in fibers:
        engine.start(fiber)

    while not all(fiber.done for fiber in fibers):
        engine.step()

    trials = sum(denoiser.seen) - 2 * 40
    assert 0 < trials <= 2 * 40 / 2 + 8


def test_trials_before_traffic_leave_those_beside_it_their_share(denoiser: Denoiser) -> None:
    engine = Engine(Together(1), exact="prefer")
    engine._steps._prover = BucketProver(8, "prefer", lambda _key: None)  # larger sizes than the scheduler's
    run(engine, [loop(denoiser, 1.0, steps=1)])
    while engine.run_trial(before_traffic=True):
        pass
    denoiser.seen.clear()

    fibers = [Fiber(loop(denoiser, float(i), steps=20, rows=2)) for i in range(2)]  # another kind of call
    for fiber in fibers:
        engine.start(fiber)
    while not all(fiber.done for fiber in fibers):
        engine.step()

    assert sum(denoiser.seen) > 2 * 2 * 20


def test_rows_of_one_lora_set_are_side_by_side() -> None:
    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.runs: list[int] = []

        def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
            rows = current_lora_rows()
            sets = rows.lora_sets if rows is not None else ()
            self.runs.append(len([key for key, _ in itertools.groupby(sets)]))
            return (hidden_states + 1,)

    module, sets = Watching(), ("one", "two")
    restore = intercept([module])

    def work(value: float) -> Callable[[], Tensor]:
        def call() -> Tensor:
            use_lora_set(sets[int(value) % 2])
            return loop(module, value)()  # type: ignore[arg-type]

        return call

    fibers = run(Engine(Together(8)), [work(float(value)) for value in range(6)])
    restore()

    assert module.runs == [2, 2, 2]
    assert [float(fiber.result[0, 0]) for fiber in fibers] == [float(value) + 3 for value in range(6)]


def test_requests_that_shared_an_unproven_batch_size_are_known(denoiser: Denoiser) -> None:
    class Indexed(nn.Module):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
            return (hidden_states + torch.arange(hidden_states.shape[0]).view(-1, 1) + timestep.sum() * 0,)

    module = Indexed()
    restore = intercept([module])
    engine = Engine(Together(8), exact="prefer")
    run(engine, [loop(module, 1.0)])  # type: ignore[arg-type]
    while engine.run_trial():
        pass

    def strict() -> Any:
        use_exactness("strict")
        return loop(module, 1.0)()  # type: ignore[arg-type]

    fibers = run(engine, [loop(module, 1.0), loop(module, 1.0), strict, loop(denoiser, 1.0)])  # type: ignore[arg-type]
    restore()

    assert [fiber.unproven for fiber in fibers] == [{"Indexed.forward"}, {"Indexed.forward"}, set(), set()]
    assert float(fibers[2].result[0, 0]) == 1.0


def test_outside_of_a_fiber_a_call_passes_through(denoiser: Denoiser) -> None:
    assert current_fiber() is None
    assert float(loop(denoiser, 1.0, steps=1)()[0, 0]) == 2.0


def test_an_error_in_one_row_fails_only_its_fiber(denoiser: Denoiser) -> None:
    good, bad, other = run(Engine(Together(8)), [loop(denoiser, v) for v in (1.0, 13.0, 2.0)])

    assert isinstance(bad.failure, ArithmeticError)
    assert good.failure is None
    assert other.failure is None
    assert float(good.result[0, 0]) == float(loop(denoiser, 1.0)()[0, 0])


def test_an_error_in_a_pipelines_own_code_fails_only_its_fiber(denoiser: Denoiser) -> None:
    def broken() -> None:
        denoiser(torch.ones(1, 2), torch.tensor(0.0))
        raise KeyError("mine")

    good, bad = run(Engine(Together(8)), [loop(denoiser, 1.0), broken])

    assert isinstance(bad.failure, KeyError)
    assert good.failure is None


def test_a_batch_that_does_not_fit_is_halved_and_the_limit_remembered(denoiser: Denoiser) -> None:
    denoiser.max_rows = 3
    engine = Engine(Together(8))

    fibers = run(engine, [loop(denoiser, i + 0.25) for i in range(8)])

    assert all(f.failure is None for f in fibers)
    assert denoiser.seen.count(8) == 1, "8 rows are not tried again"
    assert max(denoiser.seen[-4:]) <= 3


def test_a_single_call_that_does_not_fit_fails_alone_with_advice(denoiser: Denoiser) -> None:
    denoiser.max_rows = 3

    small, big = run(Engine(Together(8)), [loop(denoiser, 1.0), loop(denoiser, 1.0, rows=4)])

    assert small.failure is None
    assert isinstance(big.failure, OutOfMemory)
    assert "fewer pictures or a smaller size" in big.failure.message


def test_cancel_ends_a_parked_fiber_at_once_and_leaves_the_others(denoiser: Denoiser) -> None:
    engine = Engine(Together(8))
    victim, other = Fiber(loop(denoiser, 1.0, steps=50)), Fiber(loop(denoiser, 2.0))
    engine.start(victim)
    engine.start(other)
    engine.step()

    engine.cancel(victim)

    assert victim.done
    assert isinstance(victim.failure, FiberCancelled)
    while not engine.idle:
        engine.step()
    assert float(other.result[0, 0]) == float(loop(denoiser, 2.0)()[0, 0])


def test_a_pipeline_that_swallows_exceptions_and_parks_again_is_cancelled_all_the_same(
    denoiser: Denoiser,
) -> None:
    def stubborn() -> None:
        for _ in range(3):
            try:
                loop(denoiser, 1.0)()
            except FiberCancelled:
                continue

    engine = Engine(Together(8))
    fiber = Fiber(stubborn)
    engine.start(fiber)

    engine.cancel(fiber)

    assert fiber.done
    assert engine.idle


def test_shared_tensors_are_compared_by_value_not_by_shape(denoiser: Denoiser) -> None:
    ids = [torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 1.0]])]

    fibers = run(Engine(Together(8)), [loop(denoiser, 1.0, img_ids=i) for i in ids])

    assert [float(f.result[0, 0]) for f in fibers] == [
        float(loop(denoiser, 1.0, img_ids=i)()[0, 0]) for i in ids
    ]
    assert 2 in denoiser.seen
    assert 3 not in denoiser.seen


def test_calls_with_other_plain_arguments_are_not_merged(denoiser: Denoiser) -> None:
    run(Engine(Together(8)), [loop(denoiser, 1.0, scale=s) for s in (1.0, 1.0, 0.5)])

    assert 3 not in denoiser.seen


def test_a_call_with_an_unknown_tensor_argument_is_never_merged(denoiser: Denoiser) -> None:
    fibers = run(Engine(Together(8)), [loop(denoiser, 1.0, strange=torch.ones(1)) for _ in range(3)])

    assert set(denoiser.seen) == {1}
    assert all(f.failure is None for f in fibers)


def test_a_module_whose_output_has_no_rows_runs_alone_from_then_on() -> None:
    class Total(nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            seen.append(hidden_states.shape[0])
            return hidden_states.sum()

    seen: list[int] = []
    module = Total()
    restore = intercept([module])
    fibers = run(
        Engine(Together(8)),
        [lambda i=i: [module(torch.full((1, 1), float(i))) for _ in range(2)] for i in range(3)],  # type: ignore[misc]
    )
    restore()

    assert [[float(x) for x in f.result] for f in fibers] == [[0, 0], [1, 1], [2, 2]]
    assert seen.count(3) == 1


def test_integer_and_float_timesteps_meet_in_one_forward(denoiser: Denoiser) -> None:
    def integer() -> Tensor:
        return denoiser(torch.ones(1, 2), torch.tensor(7))[0]

    def real() -> Tensor:
        return denoiser(torch.ones(1, 2), torch.tensor([0.5]))[0]

    fibers = run(Engine(Together(8)), [integer, real])

    assert [float(f.result[0, 0]) for f in fibers] == [9.0, 2.5]
    assert denoiser.seen == [2]


def test_restoring_leaves_no_trace_on_the_module() -> None:
    module = Denoiser()
    before = dict(vars(module))

    intercept([module])()

    assert vars(module).keys() == before.keys()


class Guided(nn.Module):
    """hidden_states plus the mean of encoder_hidden_states."""

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor]:
        return (hidden_states + encoder_hidden_states.mean(dim=1, keepdim=True),)


@pytest.fixture
def guided() -> Iterator[Guided]:
    module = Guided()
    restore = intercept([module])
    yield module
    restore()


def guided_loop(module: Guided, steps: int) -> Tensor:
    """Latents of 16 KiB and embeddings of 8 KiB."""
    x, text = torch.zeros(1, 64, 64), torch.zeros(1, 32, 64)
    for step in range(steps):
        x = module(hidden_states=x, timestep=torch.tensor(float(step)), encoder_hidden_states=text)[0]
    return x


def tensor_bytes() -> int:
    """In all tensors that exist, each storage once."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and not t.is_meta]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def alive() -> tuple[int, int]:
    """Tensors and fibers that exist."""
    gc.collect()
    kinds = [type(thing) for thing in gc.get_objects()]
    return sum(issubclass(kind, Tensor) for kind in kinds), sum(issubclass(kind, Fiber) for kind in kinds)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_64_active_requests_hold_their_latents_their_embeddings_and_one_stack_of_these(
    guided: Guided,
) -> None:
    engine, before = Engine(Together(64), exact="prefer"), tensor_bytes()

    for _ in range(64):
        engine.start(Fiber(partial(guided_loop, guided, 6)))
    for _ in range(3):
        engine.step()
    held = tensor_bytes() - before
    while not engine.idle or engine.run_trial():
        engine.step()

    latents, embeddings, time = 64 * 64 * 4, 32 * 64 * 4, 4
    assert 64 * (latents + embeddings) <= held <= 64 * (latents + 2 * embeddings + time)
    assert tensor_bytes() <= before + time, "of the trials: a timestep"


def test_a_request_that_is_done_holds_no_tensor_of_its_calls_though_its_context_lives(
    denoiser: Denoiser,
) -> None:
    ids = torch.zeros(1, 2)
    held, engine = weakref.ref(ids), Engine(Together(8))
    fiber = Fiber(loop(denoiser, 1.0, img_ids=ids))
    fiber.gr_context = context = copy_context()

    engine.start(fiber)
    while not engine.idle:
        engine.step()
    result, fiber, ids = fiber.result, None, None  # type: ignore[assignment]
    gc.collect()

    assert result is not None
    assert context is not None
    assert held() is None


def test_two_thousand_short_requests_leave_nothing_behind(guided: Guided) -> None:
    engine = Engine(Together(64), exact="prefer")

    def serve(requests: int) -> None:
        for _ in range(requests // 40):
            run(engine, [partial(guided_loop, guided, 2)] * 40)

    serve(400)
    before, resident = alive(), resident_bytes()
    serve(2000)

    assert alive() == before
    assert resident_bytes() - resident < 4 * 2**20  # 2,000 latents would be 31 MiB
