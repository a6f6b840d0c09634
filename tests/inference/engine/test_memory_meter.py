"""Every forward of both lanes is measured, with the batch size that ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.intercept import intercept
from deployments.engine.step_scheduler import StepScheduler
from deployments.models.device_memory import DeviceMemory
from tests.inference.engine.together import Together

ROW = 1000  # "bytes" of one row of the denoiser


class Denoiser(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if len(hidden_states) > 3:
            raise torch.OutOfMemoryError("it is full")
        return hidden_states + 1


class Decoder(nn.Module):
    def forward(self, sample: Tensor) -> Tensor:
        return sample * 10


class AutoencoderKL(nn.Module):
    """Named as the VAE whose submodules are intercepted."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Identity(), Decoder()


class Meter:
    """Records forwards, and what they took by the size of a row, in an account."""

    def __init__(self, memory: DeviceMemory) -> None:
        self.memory = memory
        self.forwards: Counter[tuple[str, int]] = Counter()  # by lane and batch size
        self.running = 0

    def start(self, _key: Hashable, _rows: int) -> None:
        self.running += 1

    def stop(self, _started: None, lane: Any, key: Hashable, rows: int) -> None:
        self.running -= 1
        self.forwards[lane, rows] += 1
        if rows:
            self.memory.record_forward(lane, key, rows, before=0, peak=rows * ROW)


@pytest.fixture
def parts() -> Iterator[tuple[Denoiser, AutoencoderKL]]:
    made = Denoiser(), AutoencoderKL()
    restore = intercept(made)
    with torch.inference_mode():
        yield made
    restore()


def pipeline(parts: tuple[Denoiser, AutoencoderKL], steps: int) -> Callable[[], Tensor]:
    def call() -> Tensor:
        x = torch.zeros(1, 2)
        for _ in range(steps):
            x = parts[0](x)
        return parts[1].decoder(x)  # type: ignore[no-any-return]

    return call


def run(engine: Engine, works: list[Callable[[], Tensor]]) -> list[Fiber]:
    fibers = [Fiber(work) for work in works]
    for fiber in fibers:
        engine.start(fiber)
    while not engine.idle:
        engine.step()
    engine.close()
    return fibers


def test_forwards_of_both_lanes_are_measured(parts: tuple[Denoiser, AutoencoderKL]) -> None:
    meter = Meter(DeviceMemory(lambda: None))
    engine = Engine(Together(8), auxiliary_lane=True, meter=meter)

    run(engine, [pipeline(parts, 3) for _ in range(2)])

    assert meter.forwards["steps", 2] == 3
    assert sum(rows * count for (lane, rows), count in meter.forwards.items() if lane == "auxiliary") == 2
    assert meter.running == 0


def test_a_failed_forward_is_measured_as_none(parts: tuple[Denoiser, AutoencoderKL]) -> None:
    meter = Meter(DeviceMemory(lambda: None))

    fibers = run(Engine(Together(8), meter=meter), [pipeline(parts, 1) for _ in range(4)])

    assert all(fiber.failure is None for fiber in fibers)
    assert meter.forwards["steps", 0] == 1  # four rows
    assert meter.running == 0


def test_forwards_have_no_more_rows_than_fit(parts: tuple[Denoiser, AutoencoderKL]) -> None:
    memory = DeviceMemory(lambda: 3 * ROW + 500)
    meter = Meter(memory)
    engine = Engine(StepScheduler(64, memory.rows_that_fit), meter=meter)

    run(engine, [pipeline(parts, 40) for _ in range(12)])

    batch_sizes = [rows for lane, rows in meter.forwards if lane == "steps"]
    assert 2 <= max(batch_sizes) <= 3
    assert 0 not in batch_sizes  # none ran out of memory
