"""Each request is charged its share of every forward: together exactly what the engine's device computed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from deployments.engine.branches import run_branches
from deployments.engine.device_time import DeviceTime
from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.forward_timer import ForwardTimer, TimedForward
from deployments.engine.intercept import intercept
from deployments.engine.scheduled_job import ScheduledJob
from tests.inference.engine.test_forward_timer import SECONDS, Event
from tests.inference.engine.together import Together


class Denoiser(nn.Module):
    """hidden_states + timestep, unless more rows come than fit "the device"."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        if hidden_states.shape[0] > 8:
            raise torch.OutOfMemoryError("rows")
        return hidden_states + timestep.reshape(-1, 1)


@pytest.fixture
def denoiser() -> Iterator[Denoiser]:
    module = Denoiser()
    restore = intercept([module])
    yield module
    restore()


def steps_of(module: Denoiser, rows: int, steps: int, fails: bool) -> Callable[[], Tensor]:
    def call() -> Tensor:
        x = torch.zeros(rows, 2)
        for step in range(steps):
            x = module(x, torch.tensor(float(step)))
        if fails:
            raise ArithmeticError("after its last step")
        return x

    return call


def computed_s(engine: Engine) -> float:
    return sum(seconds for _, seconds in engine.stats.forwards.values())


@pytest.mark.parametrize("exact", ["off", "prefer", "strict"])
@pytest.mark.parametrize("seed", range(4))
def test_shares_of_all_requests_add_up_to_what_was_computed(
    denoiser: Denoiser, exact: str, seed: int
) -> None:
    chance = random.Random(seed)
    engine = Engine(Together(16), exact=exact, auxiliary_lane=bool(seed % 2))  # type: ignore[arg-type]
    fibers = [
        Fiber(
            steps_of(denoiser, chance.choice([1, 1, 2, 4]), chance.randrange(1, 9), chance.random() < 0.2),
            ScheduledJob(),
        )
        for _ in range(24)
    ]

    waiting, running = list(fibers), list[Fiber]()
    while waiting or running:
        if waiting and chance.random() < 0.5:
            running.append(waiting.pop())
            engine.start(running[-1])
        if running and chance.random() < 0.05:
            engine.cancel(chance.choice(running))
        if not engine.idle:
            engine.step()
        running = [fiber for fiber in running if not fiber.done]
    engine.close()

    charged = [fiber.job.device_time.total_s() for fiber in fibers]
    assert sum(charged) == pytest.approx(computed_s(engine), rel=1e-9)
    assert sum(charged) > 0


def test_a_forward_is_shared_by_rows(denoiser: Denoiser) -> None:
    engine = Engine(Together(8))
    fibers = [Fiber(steps_of(denoiser, rows, 1, False), ScheduledJob()) for rows in (1, 3)]
    for fiber in fibers:
        engine.start(fiber)

    engine.step()

    small, large = (fiber.job.device_time.total_s() for fiber in fibers)
    assert large == pytest.approx(3 * small)
    assert small + large == pytest.approx(computed_s(engine))


def test_branches_are_charged_to_their_request(denoiser: Denoiser) -> None:
    engine = Engine(Together(8))
    both = [steps_of(denoiser, 1, 2, False), steps_of(denoiser, 1, 3, False)]
    fiber = Fiber(partial(run_branches, both), ScheduledJob())

    engine.start(fiber)
    while not engine.idle:
        engine.step()

    assert fiber.job.device_time.total_s() == pytest.approx(computed_s(engine))


def test_forwards_that_a_gpu_has_not_done_yet_are_in_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.made = Event.reached = 0
    timer = ForwardTimer(lambda *_: None, torch.device("cuda"), lambda: 0.0)
    one, two = ScheduledJob(), ScheduledJob()
    for jobs, rows in (([one, two], [1, 3]), ([two], [1]), ([one], [2])):
        timer.start()
        timer.stop(TimedForward("net", "key", sum(rows), jobs, rows))

    known = one.device_time.so_far_s
    totals = [one.device_time.total_s(), two.device_time.total_s()]
    timer.wait()

    assert known == pytest.approx(SECONDS / 4)
    assert totals == [pytest.approx(1.25 * SECONDS), pytest.approx(1.75 * SECONDS)]
    assert [one.device_time.total_s(), two.device_time.total_s()] == totals
    assert two.device_time.so_far_s == pytest.approx(1.75 * SECONDS)


def test_branches_in_one_forward_have_one_account_there() -> None:
    whole = ScheduledJob()
    branches = [ScheduledJob(whole=whole), ScheduledJob(whole=whole)]

    shares = TimedForward("net", "key", 4, [*branches, ScheduledJob()], [1, 1, 2]).shares()

    assert shares[whole.device_time] == pytest.approx(0.5)
    assert sum(shares.values()) == pytest.approx(1.0)


def test_a_video_adds_what_its_decoding_took() -> None:
    account = DeviceTime()

    account.add(0.5)
    account.add(0.25)

    assert account.total_s() == account.so_far_s == 0.75
