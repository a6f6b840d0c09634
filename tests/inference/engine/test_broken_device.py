"""A broken device ends the engine and fails no request; the retry of its cause counts, others just go on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deployments.engine.device_errors import DeviceBroken
from deployments.engine.engine import Engine
from deployments.engine.intercept import intercept
from deployments.engine.scheduled_job import ScheduledJob
from deployments.engine.work import Checkpointed, Emit, Finished, Work
from deployments.engine.worker import Worker
from deployments.protocol.errors import ModelUnavailable
from deployments.protocol.events import Failed, Step
from tests.inference.engine.together import Together
from tests.patience import patience

PATIENCE_S = patience(4)


def illegal_access() -> torch.AcceleratorError:
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    error.error_code = 700  # type: ignore[attr-defined]
    return error


class Gate(nn.Module):
    """x + 1; breaks the device when `breaks` is set, and on a value of 13."""

    breaks = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.breaks or bool((hidden_states == 13).any()):
            raise illegal_access()
        return hidden_states + 1


class Decoder(Gate):
    """The same on the auxiliary lane, when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may, self.began = threading.Event(), threading.Event()

    def forward(self, sample: Tensor) -> Tensor:
        self.began.set()
        assert self.may.wait(PATIENCE_S)
        return super().forward(sample)


class AutoencoderKL(nn.Module):
    """Named as the VAE whose decoder runs on the auxiliary lane."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Identity(), Decoder()


class Model:
    """A denoiser and a VAE."""

    def __init__(self) -> None:
        self.gate, self.other, self.vae = Gate(), Gate(), AutoencoderKL()


@pytest.fixture
def model() -> Iterator[Model]:
    made = Model()
    restore = intercept([made.gate, made.other, made.vae])
    yield made
    made.vae.decoder.may.set()
    restore()


@pytest.fixture
def worker() -> Iterator[Worker]:
    scheduler = Together(1)  # one call per forward
    made = Worker(Engine(scheduler, auxiliary_lane=True), scheduler, slots=2)
    yield made
    made.stop()


def steps(module: nn.Module, value: float, count: int = 10**9) -> Work:
    """So many calls of the module, each with what the last one returned."""

    def work(emit: Emit) -> float:
        x = torch.full((1, 1), value)
        for step in range(count):
            x = module(x)
            emit(Step(step + 1, count))
        return float(x)

    return work


async def everything(items: AsyncIterator[Any]) -> list[Any]:
    async with asyncio.timeout(PATIENCE_S):
        return [item async for item in items]


async def begun(items: AsyncIterator[Any]) -> None:
    async for item in items:
        if isinstance(item, Step):
            return


def was_handed_over(items: list[Any]) -> bool:
    """Whether the request came back so that its retry does not count."""
    *_, before, last = [None, *items]
    assert isinstance(last, Failed)
    assert (last.kind, last.retryable) == (ModelUnavailable.kind, True)
    return before == Checkpointed(None)


async def test_only_the_retry_of_the_cause_counts(worker: Worker, model: Model) -> None:
    bystander = worker.submit(steps(model.other, 20.0), ScheduledJob())
    await begun(bystander)
    cause = worker.submit(steps(model.gate, 20.0), ScheduledJob())
    await begun(cause)
    waiting = worker.submit(steps(model.other, 20.0), ScheduledJob(), snapshot=lambda: b"state")
    await anext(waiting)
    model.gate.breaks = True

    ends = await asyncio.gather(everything(bystander), everything(cause), everything(waiting))

    assert [was_handed_over(items) for items in ends] == [True, False, True]
    assert worker.stats.device_failures == 1
    assert worker.stats.preempted == 2
    assert worker.stats.failures == {"model_unavailable": 1}


async def test_the_thread_ends_and_the_health_check_says_why(worker: Worker, model: Model) -> None:
    await everything(worker.submit(steps(model.gate, 13.0), ScheduledJob()))

    with pytest.raises(ModelUnavailable, match="the device failed"):
        worker.check()
    assert worker.lost


async def test_work_that_comes_later_is_handed_over(worker: Worker, model: Model) -> None:
    await everything(worker.submit(steps(model.gate, 13.0), ScheduledJob()))

    later = await everything(worker.submit(steps(model.gate, 0.0, count=1), ScheduledJob()))

    assert was_handed_over(later)
    with pytest.raises(ModelUnavailable):
        await worker.run_on_thread(lambda: None)


def in_the_pipeline(_model: Model, _worker: Worker) -> Work:
    def work(_emit: Emit) -> None:
        raise illegal_access()

    return work


def while_it_is_decoded(model: Model, _worker: Worker) -> Work:
    model.vae.decoder.may.set()
    return steps(model.vae.decoder, 13.0)


def wrapped_by_a_library(_model: Model, _worker: Worker) -> Work:
    def work(_emit: Emit) -> None:
        raise ValueError("cannot load") from illegal_access()

    return work


@pytest.mark.parametrize("breaks", [in_the_pipeline, while_it_is_decoded, wrapped_by_a_library])
async def test_a_device_that_breaks_anywhere_in_a_fiber_is_no_failure_of_the_request(
    breaks: Callable[[Model, Worker], Work], worker: Worker, model: Model
) -> None:
    items = await everything(worker.submit(breaks(model, worker), ScheduledJob()))

    assert not was_handed_over(items)
    with pytest.raises(ModelUnavailable, match="the device failed"):
        worker.check()


async def test_a_function_on_the_thread_that_breaks_the_device_ends_the_engine(
    worker: Worker, model: Model
) -> None:
    running = worker.submit(steps(model.other, 20.0), ScheduledJob())
    await begun(running)

    def function() -> None:
        raise illegal_access()

    with pytest.raises(torch.AcceleratorError):
        await worker.run_on_thread(function)
    await everything(running)

    with pytest.raises(ModelUnavailable, match="the device failed"):
        worker.check()


async def test_a_device_that_breaks_outside_of_the_engine_hands_over_all_that_runs(
    worker: Worker, model: Model
) -> None:
    running = worker.submit(steps(model.other, 20.0), ScheduledJob())
    await begun(running)

    worker.report_broken_device(illegal_access())

    with pytest.raises(ModelUnavailable, match="the device failed"):
        worker.check()
    assert was_handed_over(await everything(running))


async def test_a_trial_that_breaks_the_device_counts_for_all_whose_shapes_it_may_have(
    worker: Worker, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trial(_engine: Engine, **_options: bool) -> None:
        raise DeviceBroken(()) from illegal_access()

    running = worker.submit(steps(model.other, 20.0), ScheduledJob())
    await begun(running)

    monkeypatch.setattr(Engine, "step", trial)

    assert not was_handed_over(await everything(running))


async def test_a_decode_in_flight_is_handed_over_when_the_steps_break_the_device(
    worker: Worker, model: Model
) -> None:
    decoding = worker.submit(steps(model.vae.decoder, 0.0), ScheduledJob())
    await anext(decoding)
    assert await asyncio.to_thread(model.vae.decoder.began.wait, PATIENCE_S)

    cause = await everything(worker.submit(steps(model.gate, 13.0), ScheduledJob()))
    model.vae.decoder.may.set()

    assert not was_handed_over(cause)
    assert was_handed_over(await everything(decoding))


async def test_a_lack_of_memory_in_other_words_fails_its_own_request_only(
    worker: Worker, model: Model
) -> None:
    def too_large(_emit: Emit) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    failed = (await everything(worker.submit(too_large, ScheduledJob())))[-1]
    later = await everything(worker.submit(steps(model.gate, 0.0, count=2), ScheduledJob()))

    assert (failed.kind, failed.retryable) == ("out_of_memory", False)
    assert isinstance(later[-1], Finished)
    worker.check()
