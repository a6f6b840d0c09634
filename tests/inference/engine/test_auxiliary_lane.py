"""The auxiliary lane: a VAE runs in parallel to the steps of other requests, and delays none of them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber, FiberCancelled
from deployments.engine.intercept import intercept
from deployments.engine.scheduled_job import ScheduledJob
from deployments.engine.work import Emit, Finished
from deployments.engine.worker import Worker
from deployments.protocol.events import Failed, Step
from deployments.protocol.request import Exactness
from tests.inference.engine.together import Together
from tests.patience import patience

PATIENCE_S = patience(2)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.began: Callable[[], object] = lambda: None  # called when a forward begins

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.began()
        return hidden_states + 1


class Decoder(nn.Module):
    """sample x 10, when it may; notes the rows and the thread of every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.may = threading.Event()
        self.may.set()
        self.rows: list[int] = []
        self.began_rows: list[int] = []
        self.threads: set[str] = set()
        self.max_rows = 10**6  # rows that fit "the device"
        self.began: Callable[[], object] = lambda: None  # called when a forward begins

    def forward(self, sample: Tensor) -> Tensor:
        self.began()
        self.began_rows.append(sample.shape[0])
        assert self.may.wait(PATIENCE_S)
        self.rows.append(sample.shape[0])
        self.threads.add(threading.current_thread().name)
        if sample.shape[0] > self.max_rows:
            raise torch.OutOfMemoryError(f"{sample.shape[0]} rows")
        return sample * 10


class AutoencoderKL(nn.Module):
    """Named as the VAE whose submodules are cut."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Identity(), Decoder()


class TinyModel:
    """A model in small: a denoiser and a VAE."""

    def __init__(self) -> None:
        self.denoiser, self.vae = Denoiser(), AutoencoderKL()

    def generate(self, value: float, steps: int, on_step: Callable[[int], None] = lambda _step: None) -> Any:
        def call() -> Tensor:
            x = torch.full((1, 2), value)
            for step in range(steps):
                x = self.denoiser(x)
                on_step(step + 1)
            return self.vae.decoder(x)

        return call


@pytest.fixture
def model() -> Iterator[TinyModel]:
    made = TinyModel()
    restore = intercept([made.denoiser, made.vae])
    with torch.inference_mode():
        yield made
    made.vae.decoder.may.set()
    restore()


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(Together(8), auxiliary_lane=True)
    yield made
    made.close()


def step_until(engine: Engine, true: Callable[[], bool]) -> None:
    """Step without waiting for the auxiliary lane."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if true():
            return
        engine.step(block=False)
    pytest.fail("it did not come true in time")


def run_out(engine: Engine) -> None:
    while not engine.idle:
        engine.step()


def test_steps_go_on_while_an_image_is_decoded(model: TinyModel, engine: Engine) -> None:
    decoder = model.vae.decoder
    decoder.may.clear()
    short, long = Fiber(model.generate(0.0, steps=1)), Fiber(model.generate(5.0, steps=40))
    for fiber in (short, long):
        engine.start(fiber)

    for _ in range(41):  # the 40 steps of the longer one, one of them shared, and then its decoding parks
        engine.step() if long.call is None or long.call.seam.name != "Decoder.forward" else None
    decoded_before = list(decoder.rows)
    decoder.may.set()
    run_out(engine)

    assert decoded_before == [], "all steps of the longer one were done before the first image was decoded"
    assert torch.equal(short.result, torch.full((1, 2), 10.0))
    assert torch.equal(long.result, torch.full((1, 2), 450.0))
    assert threading.current_thread().name not in decoder.threads


def test_images_that_wait_for_the_lane_are_decoded_together(model: TinyModel, engine: Engine) -> None:
    model.vae.decoder.may.clear()
    fibers = [Fiber(model.generate(float(i), steps=1 if i == 0 else 2)) for i in range(4)]
    for fiber in fibers:
        engine.start(fiber)
    engine.step()  # all take a step: the next step starts the decode of the first image
    engine.step()  # the other three take their second

    model.vae.decoder.may.set()
    run_out(engine)

    assert model.vae.decoder.rows == [1, 3]
    assert [float(fiber.result[0, 0]) for fiber in fibers] == [10.0, 30.0, 40.0, 50.0]


def test_an_image_cancelled_while_it_is_decoded_ends_and_affects_no_other(
    model: TinyModel, engine: Engine
) -> None:
    model.vae.decoder.may.clear()
    fibers = [Fiber(model.generate(float(i), steps=1)) for i in range(2)]
    for fiber in fibers:
        engine.start(fiber)
    engine.step()
    other = Fiber(model.generate(7.0, steps=3))
    engine.start(other)
    engine.step()  # both images are on the auxiliary lane now

    engine.cancel(fibers[0])
    over_at_once = fibers[0].done
    model.vae.decoder.may.set()
    run_out(engine)

    assert not over_at_once
    assert isinstance(fibers[0].failure, FiberCancelled)
    assert float(fibers[1].result[0, 0]) == 20.0
    assert float(other.result[0, 0]) == 100.0


def test_too_many_images_for_the_memory_are_decoded_in_halves(model: TinyModel, engine: Engine) -> None:
    model.vae.decoder.max_rows = 2
    fibers = [Fiber(model.generate(float(i), steps=1)) for i in range(4)]
    for fiber in fibers:
        engine.start(fiber)

    run_out(engine)

    assert model.vae.decoder.rows == [4, 2, 2]
    assert [float(fiber.result[0, 0]) for fiber in fibers] == [10.0, 20.0, 30.0, 40.0]


def test_the_engine_waits_for_no_decode_that_is_repeated_in_halves(model: TinyModel, engine: Engine) -> None:
    decoder = model.vae.decoder
    decoder.max_rows = 1
    first, second = (Fiber(model.generate(float(i), steps=1)) for i in range(2))
    new = Fiber(lambda: model.denoiser(torch.zeros(1, 2)))
    for fiber in (first, second):
        engine.start(fiber)
    step_until(engine, lambda: bool(decoder.rows))
    decoder.may.clear()  # the halves take long

    step_until(engine, lambda: decoder.began_rows == [2, 1])
    engine.cancel(second)
    engine.start(new)
    engine.step(block=False)
    ended = [fiber.done for fiber in (first, second, new)]
    decoder.may.set()
    run_out(engine)

    assert ended == [False, True, True]
    assert decoder.rows == [2, 1]
    assert float(first.result[0, 0]) == 10.0


@pytest.mark.parametrize("fits_alone", [True, False])
def test_a_decode_that_does_not_fit_beside_a_step_is_repeated_while_nothing_else_runs(
    model: TinyModel, engine: Engine, fits_alone: bool
) -> None:
    """Both lanes take memory of one device: a picture that fits must not fail by what others compute."""
    step_runs, tried = threading.Event(), threading.Event()
    threads: list[str] = []  # that failed to decode

    def take_memory() -> None:
        step_runs.set()
        assert tried.wait(PATIENCE_S)

    def need_memory() -> None:
        assert step_runs.wait(PATIENCE_S)
        if not threads or not fits_alone:
            threads.append(threading.current_thread().name)
            tried.set()
            raise torch.OutOfMemoryError("beside a step")

    decoded, other = Fiber(model.generate(1.0, steps=1)), Fiber(model.generate(5.0, steps=3))
    engine.start(decoded)
    engine.step()
    model.denoiser.began, model.vae.decoder.began = take_memory, need_memory
    engine.start(other)

    step_until(engine, lambda: decoded.done)
    model.vae.decoder.began = lambda: None
    run_out(engine)

    assert float(other.result[0, 0]) == 80.0
    if fits_alone:
        assert float(decoded.result[0, 0]) == 20.0
    else:
        assert "fewer pictures" in str(decoded.failure)
        assert threads[1:] == [threading.current_thread().name], "while the other lane is idle"


def test_a_failed_decode_fails_its_own_request_only(model: TinyModel, engine: Engine) -> None:
    model.vae.decoder.max_rows = 0
    fiber, other = Fiber(model.generate(1.0, steps=1)), Fiber(lambda: model.denoiser(torch.zeros(1, 2)))
    for one in (fiber, other):
        engine.start(one)

    run_out(engine)

    assert fiber.failure is not None
    assert "fewer pictures" in str(fiber.failure)
    assert float(other.result[0, 0]) == 1.0


@pytest.mark.parametrize(("exact", "rows"), [("prefer", [1] * 4), ("off", [2, 2])])
def test_decodes_share_no_forward_where_their_bits_are_promised(
    model: TinyModel, exact: Exactness, rows: list[int]
) -> None:
    """At the picture's own resolution a second row costs as much as the first."""
    engine = Engine(Together(2), exact=exact, auxiliary_lane=True)
    for value in range(4):
        engine.start(Fiber(model.generate(float(value), steps=1)))

    run_out(engine)
    engine.close()

    assert sorted(model.vae.decoder.rows) in (rows, [1, 1, 2])


async def test_a_request_cancelled_while_it_is_decoded_frees_its_slot(model: TinyModel) -> None:
    scheduler = Together(8)
    worker = Worker(Engine(scheduler, auxiliary_lane=True), scheduler, slots=1)
    decoder = model.vae.decoder
    decoder.may.clear()
    decoding = asyncio.Event()
    loop = asyncio.get_running_loop()
    decoder.began = lambda: loop.call_soon_threadsafe(decoding.set)

    first = worker.submit(lambda _emit: model.generate(0.0, 1)(), ScheduledJob())
    reading = asyncio.create_task(anext(first))
    await decoding.wait()
    await reading
    await first.aclose()
    second = worker.submit(lambda _emit: model.denoiser(torch.zeros(1, 2)), ScheduledJob())
    decoder.may.set()

    async with asyncio.timeout(PATIENCE_S):
        items = [item async for item in second]
    assert isinstance(items[-1], Finished)
    worker.stop()


async def test_a_request_that_arrives_during_a_decode_alone_starts_at_once(
    model: TinyModel,
) -> None:
    scheduler = Together(8)
    engine = Engine(scheduler, auxiliary_lane=True)
    steps, step = [], engine.step
    engine.step = lambda **options: steps.append(None) or step(**options)  # type: ignore[method-assign, func-returns-value]
    worker = Worker(engine, scheduler, slots=2)
    decoder = model.vae.decoder
    decoder.may.clear()
    decoding = asyncio.Event()
    loop = asyncio.get_running_loop()
    decoder.began = lambda: loop.call_soon_threadsafe(decoding.set)

    first = worker.submit(lambda _emit: model.generate(0.0, 1)(), ScheduledJob())
    await anext(first)
    await decoding.wait()
    await asyncio.sleep(0.05)
    async with asyncio.timeout(PATIENCE_S / 2):
        second = [item async for item in worker.submit(lambda _emit: 7, ScheduledJob())]
    decoder.may.set()
    rest = [item async for item in first]

    assert len(steps) < 10, "the worker waits, it does not poll"
    assert isinstance(second[-1], Finished)
    assert isinstance(rest[-1], Finished)
    worker.stop()


async def test_a_draining_worker_preempts_at_once_what_it_was_decoding(model: TinyModel) -> None:
    scheduler = Together(8)
    worker = Worker(Engine(scheduler, auxiliary_lane=True), scheduler, slots=2)
    decoder = model.vae.decoder
    decoder.may.clear()

    def work(emit: Emit) -> Any:
        return model.generate(0.0, 1, lambda step: emit(Step(step, 1)))()

    def endless(emit: Emit) -> Any:
        return model.generate(0.0, 10**9, lambda step: emit(Step(step, 10**9)))()

    items = worker.submit(work, ScheduledJob(steps=10**9, shape="s"))
    others = worker.submit(endless, ScheduledJob(steps=10**9, shape="s"))
    async for item in items:
        if isinstance(item, Step):
            break
    steps_seen = 0
    async for item in others:  # by now the first is on the auxiliary lane
        steps_seen += isinstance(item, Step)
        if steps_seen == 3:
            break

    worker.drain(grace_s=0.0)
    rest = [item async for item in items]
    decoder.may.set()
    ending = [item async for item in others]

    assert isinstance(rest[-1], Failed)
    assert rest[-1].retryable
    assert not any(isinstance(item, Finished) for item in [*rest, *ending])
    worker.stop()
    worker_thread_died_well = worker.active == 0
    assert worker_thread_died_well
