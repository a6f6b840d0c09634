"""A model, a set of requests, their answers alone, and random schedules of them through the engine."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from deployments.engine.batch_buckets import pad_small_linears
from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.intercept import intercept
from deployments.engine.scheduled_job import ParkedCall, ScheduledJob
from deployments.engine.step_scheduler import StepScheduler
from deployments.pipelines.arguments import call_arguments
from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.protocol.request import Control, ControlType, Exactness, ResolvedEdit, ResolvedRequest, Task

PROMPTS = ("a cat", "two dogs on a red hill", "rain", "a house by the sea, at night, in the style of no one")
IMAGE = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 40).convert("RGB")
MASK = Image.new("L", (64, 64)).point(lambda _: 0)
MASK.paste(255, (0, 0, 32, 64))
MAPS: dict[ControlType, Image.Image] = {
    "canny": IMAGE.convert("L").point(lambda value: 255 if value > 60 else 0).convert("RGB"),
    "depth": Image.linear_gradient("L").resize((64, 64)).convert("RGB"),
}


class AnyOrder(StepScheduler):
    """Picks any call and any number of calls of its key: no image may depend on the policy."""

    def __init__(self, max_batch_size: int, rng: random.Random) -> None:
        super().__init__(max_batch_size)
        self._rng = rng

    def pick(self, waiting: Sequence[ParkedCall], now: float = 0.0, *, observe: bool = True) -> list[int]:
        order = self._rng.sample(range(len(waiting)), len(waiting))
        picked, free = [order[0]], self._rng.randint(1, self.max_batch_size) - waiting[order[0]].batch_size
        for i in order[1:]:
            same_key = waiting[i].key is not None and waiting[i].key == waiting[order[0]].key
            if same_key and waiting[i].batch_size <= free:
                picked.append(i)
                free -= waiting[i].batch_size
        return picked


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request's pipeline call gave."""

    latents: torch.Tensor  # (B, C, H, W) or as the pipeline packs them
    pictures: tuple[npt.NDArray[np.uint8], ...]  # decoded, (H, W, 3); none where only latents were asked

    def same_bits(self, other: Answer) -> bool:
        """Not a bit differs, in latents and pictures."""
        return torch.equal(self.latents, other.latents) and all(
            np.array_equal(a, b) for a, b in zip(self.pictures, other.pictures, strict=True)
        )

    def distance(self, other: Answer) -> float:
        """Largest difference of the latents over the largest latent."""
        return float((self.latents - other.latents).abs().max() / other.latents.abs().max())


@dataclass
class Bench:
    """One model and the answers it gave to single requests."""

    model: DiffusersModel
    requests: list[ResolvedRequest]
    decode: bool = False  # to pictures, through the VAE
    deterministic: bool = False
    auxiliary_lane: bool = False  # the VAE in a thread of its own: when it is done is not up to the schedule
    alone: dict[ResolvedRequest, Answer] = field(default_factory=dict)
    forwards: int = 0
    rows: int = 0

    @property
    def policy(self) -> Exactness:
        """Of the engine: not a bit may differ, or rounding may."""
        return "strict" if self.deterministic else "off"

    def work(self, request: ResolvedRequest) -> Callable[[], Answer]:
        """The request's pipeline call."""

        def call() -> Answer:
            pipeline = self.model.pipeline_for(request)
            image = IMAGE.resize((request.width, request.height)) if request.edit else None
            mask = MASK.resize((request.width, request.height)) if request.task is Task.inpaint else None
            size = request.width, request.height
            maps = [MAPS[control.type].resize(size) for control in request.controls]
            arguments: dict[str, Any] = call_arguments(type(pipeline), request, image, mask, maps)
            kept: dict[str, torch.Tensor] = {}

            def keep(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                kept["latents"] = tensors["latents"]
                return tensors

            kind = "np" if self.decode else "latent"
            result = pipeline(**(arguments | {"output_type": kind, "callback_on_step_end": keep})).images
            if not self.decode:
                return Answer(result, ())
            return Answer(kept["latents"], tuple((result * 255).round().astype(np.uint8)))

        return call

    def expected(self, request: ResolvedRequest) -> Answer:
        """The answer alone: of the plain pipeline, or of a deterministic engine with no other."""
        if request not in self.alone:
            if not self.deterministic:
                self.alone[request] = self.work(request)()
            else:
                fiber = Fiber(self.work(request))
                self._run(Engine(StepScheduler(8), exact="strict"), [fiber])
                if fiber.failure is not None:
                    raise fiber.failure
                self.alone[request] = fiber.result
        return self.alone[request]

    def together(self, requests: list[ResolvedRequest], max_batch_size: int = 8) -> list[Fiber]:
        """All at once through one engine."""
        fibers = [Fiber(self.work(request)) for request in requests]
        scheduler = AnyOrder(max_batch_size, random.Random(0))
        self._run(Engine(scheduler, exact=self.policy), fibers)
        return fibers

    def _run(self, engine: Engine, fibers: list[Fiber]) -> None:
        restores = self._prepare()
        try:
            for fiber in fibers:
                engine.start(fiber)
            while not engine.idle:
                engine.step()
        finally:
            for restore in restores:
                restore()

    def _prepare(self) -> list[Callable[[], None]]:
        restores = [intercept(self.model.modules)]
        if self.deterministic:
            restores.append(pad_small_linears(self.model.modules))
        return restores

    def play(self, rng: random.Random) -> list[tuple[ResolvedRequest, Fiber]]:
        """A random schedule: joins between steps, cancels; every other one by the real policy with users,
        priorities and deadlines, which preempt, the others in any order at all."""
        clock, rows = itertools.count(), rng.choice([2, 3, 4, 8])
        scheduler = StepScheduler(rows) if rng.random() < 0.5 else AnyOrder(rows, rng)
        engine = Engine(
            scheduler,
            exact=self.policy,
            auxiliary_lane=self.auxiliary_lane,
            now=lambda: float(next(clock)),
        )
        fibers: list[tuple[ResolvedRequest, Fiber]] = []
        doomed: list[Fiber] = []
        to_come = rng.sample(self.requests, rng.randint(2, 8))
        restores = self._prepare()
        try:
            while to_come or not engine.idle:
                if to_come and (engine.idle or rng.random() < 0.7):
                    request = to_come.pop()
                    job = ScheduledJob(
                        user=rng.choice("abc"),
                        priority=rng.choice([-1, 0, 0, 1]),
                        deadline=rng.choice([None, None, 40.0]),
                        submitted_at=float(next(clock)),
                        steps=request.num_inference_steps,
                        batch_size=request.num_images,
                        shape=(request.width, request.height),
                    )
                    fiber = Fiber(self.work(request), job)
                    fibers.append((request, fiber))
                    engine.start(fiber)
                    if rng.random() < 0.15:
                        doomed.append(fiber)
                engine.step()
                if doomed and rng.random() < 0.3:
                    engine.cancel(doomed.pop())
        finally:
            engine.close()
            for restore in restores:
                restore()
        self.forwards += engine.forwards
        self.rows += engine.rows
        return fibers


def some_request(
    rng: random.Random,
    *,
    guidance: tuple[float, ...],
    schedulers: tuple[str, ...],
    text_tokens: int | None,
    controls: tuple[tuple[ControlType, ...], ...] = ((),),
) -> ResolvedRequest:
    """A request of any task, size, length and seed; controls: kinds of control pictures, one of these."""
    edit = rng.choice([None, None, b"", b"mask"])
    request = ResolvedRequest(
        model="tiny",
        prompt=rng.choice(PROMPTS),
        negative_prompt=rng.choice(["", "blurry"]),
        width=rng.choice([64, 64, 64, 96]),
        height=64,
        num_inference_steps=rng.choice([1, 2, 3, 3, 4, 4, 6, 6, 9, rng.randint(10, 50)]),
        guidance_scale=rng.choice(guidance),
        seed=rng.randrange(2**40),
        num_images=rng.choice([1, 1, 1, 2]),
        scheduler=rng.choice(schedulers),
        max_sequence_length=text_tokens,
        edit=None
        if edit is None
        else ResolvedEdit(image=b"", mask_image=edit or None, strength=rng.choice([0.5, 0.8, 1.0])),
    )
    if request.edit and request.num_inference_steps * request.edit.strength < 1:  # no step would be left
        request = request.model_copy(update={"edit": request.edit.model_copy(update={"strength": 1.0})})
    if controls == ((),):
        return request
    chosen = [
        Control(image=b"", type=kind, weight=rng.choice([0.4, 1.0]), end=rng.choice([0.5, 1.0]))
        for kind in rng.choice(controls)
    ]
    return request.model_copy(update={"controls": tuple(chosen)})
