"""The promise: a request in any batch equals the same request alone.

In float64, where rounding cannot hide a mistake: differences measured are below 1e-13 of the latents'
range. In float32 the same schedules differ by 1e-7 to 3e-5 (DDIM at guidance 7.5 amplifies most).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from PIL import Image

from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber, FiberCancelled
from deployments.engine.intercept import intercept
from deployments.engine.step_scheduler import StepScheduler
from deployments.pipelines.arguments import call_arguments
from deployments.pipelines.model import Model
from deployments.protocol.request import FittedEdit, FittedRequest, Task
from tests.workshop import tiny

SCHEDULES = 100
TOLERANCE = 1e-11  # of the largest latent
PROMPTS = ("a cat", "two dogs on a red hill", "rain", "a house by the sea, at night, in the style of nobody")
SDXL_SCHEDULERS = ("auto", "euler", "euler_a", "ddim", "dpmpp_2m", "dpmpp_2m_karras", "unipc", "heun", "lcm")
PICTURE = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 40).convert("RGB")
MASK = Image.new("L", (64, 64)).point(lambda _: 0)
MASK.paste(255, (0, 0, 32, 64))


@dataclass
class Bench:
    """One model and the answers it gave to single requests."""

    model: Model
    requests: list[FittedRequest]
    alone: dict[FittedRequest, torch.Tensor] = field(default_factory=dict)

    def work(self, request: FittedRequest) -> Callable[[], torch.Tensor]:
        """The request's pipeline call, giving final latents."""

        def call() -> torch.Tensor:
            pipeline = self.model.pipeline_for(request)
            image = PICTURE.resize((request.width, request.height)) if request.edit else None
            mask = MASK.resize((request.width, request.height)) if request.task is Task.inpaint else None
            arguments: dict[str, Any] = call_arguments(type(pipeline), request, image, mask)
            result: torch.Tensor = pipeline(**(arguments | {"output_type": "latent"})).images
            return result

        return call

    def expected(self, request: FittedRequest) -> torch.Tensor:
        """The answer of a plain, lonely pipeline call."""
        if request not in self.alone:
            self.alone[request] = self.work(request)()
        return self.alone[request]


def some_request(
    rng: random.Random, *, guidance: tuple[float, ...], schedulers: tuple[str, ...]
) -> FittedRequest:
    edit = rng.choice([None, None, b"", b"mask"])
    return FittedRequest(
        model="tiny",
        prompt=rng.choice(PROMPTS),
        negative_prompt=rng.choice(["", "blurry"]),
        width=rng.choice([64, 64, 64, 96]),
        height=64,
        num_inference_steps=rng.choice([2, 3, 4, 6]),
        guidance_scale=rng.choice(guidance),
        seed=rng.randrange(2**40),
        num_images=rng.choice([1, 1, 1, 2]),
        scheduler=rng.choice(schedulers),
        max_sequence_length=None,
        edit=None
        if edit is None
        else FittedEdit(image=b"", mask_image=edit or None, strength=rng.choice([0.5, 0.8, 1.0])),
    )


@pytest.fixture(scope="module")
def flux_bench() -> Bench:
    rng = random.Random(1)
    requests = [
        some_request(rng, guidance=(0.0, 1.0, 3.5, 7.0), schedulers=("auto",)).model_copy(
            update={"max_sequence_length": 48}
        )
        for _ in range(40)
    ]
    return Bench(Model(tiny.flux().to(dtype=torch.float64), list(Task)), requests)


@pytest.fixture(scope="module")
def sdxl_bench() -> Bench:
    rng = random.Random(2)
    requests = [some_request(rng, guidance=(1.0, 3.0, 7.5), schedulers=SDXL_SCHEDULERS) for _ in range(24)]
    return Bench(Model(tiny.sdxl().to(dtype=torch.float64), list(Task)), requests)


def play(bench: Bench, rng: random.Random) -> tuple[list[tuple[FittedRequest, Fiber]], Engine]:
    """A random schedule: requests join between steps and some are cancelled on the way."""
    engine = Engine(StepScheduler(max_rows=rng.choice([2, 4, 8])))
    fibers: list[tuple[FittedRequest, Fiber]] = []
    doomed: list[Fiber] = []
    to_come = rng.sample(bench.requests, rng.randint(2, 6))
    restore = intercept(bench.model.modules)
    try:
        while to_come or not engine.idle:
            if to_come and (engine.idle or rng.random() < 0.5):
                request = to_come.pop()
                fiber = Fiber(bench.work(request))
                fibers.append((request, fiber))
                engine.start(fiber)
                if rng.random() < 0.15:
                    doomed.append(fiber)
            engine.step()
            if doomed and rng.random() < 0.3:
                engine.cancel(doomed.pop())
    finally:
        restore()
    return fibers, engine


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_any_request_in_any_batch_equals_the_request_alone(
    family: str, request: pytest.FixtureRequest
) -> None:
    bench: Bench = request.getfixturevalue(f"{family}_bench")
    rng = random.Random(family)
    rows = forwards = compared = 0

    with torch.inference_mode():
        for request_ in bench.requests:
            bench.expected(request_)
        for _ in range(SCHEDULES // 2):
            fibers, engine = play(bench, rng)
            rows, forwards = rows + engine.rows, forwards + engine.forwards
            for wish, fiber in fibers:
                if isinstance(fiber.failure, FiberCancelled):
                    continue
                assert fiber.failure is None
                error = relative_error(fiber.result, bench.expected(wish))
                assert error <= TOLERANCE, f"{error:.1e} in {wish!r}"
                compared += 1

    assert compared > 80
    assert rows > 1.3 * forwards, "the schedules must really share forwards"


def test_pictures_of_equal_token_count_and_different_shape_are_not_merged(flux_bench: Bench) -> None:
    tall, wide = (
        flux_bench.requests[0].model_copy(update={"width": w, "height": h, "edit": None, "num_images": 1})
        for w, h in ((64, 96), (96, 64))
    )
    engine = Engine(StepScheduler(max_rows=8))

    with torch.inference_mode():
        expected = [flux_bench.work(r)() for r in (tall, wide)]
        restore = intercept(flux_bench.model.modules)
        fibers = [Fiber(flux_bench.work(r)) for r in (tall, wide)]
        for fiber in fibers:
            engine.start(fiber)
        while not engine.idle:
            engine.step()
        restore()

    for fiber, alone in zip(fibers, expected, strict=True):
        assert relative_error(fiber.result, alone) <= TOLERANCE
