"""A set of requests, their answers alone, and random schedules of them through the engine."""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from deployments.engine.batch_buckets import pad_small_linears
from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.intercept import intercept
from deployments.engine.scheduled_job import ParkedCall, ScheduledJob
from deployments.engine.step_scheduler import StepScheduler
from deployments.pipelines.arguments import call_arguments
from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.pipelines.guidance import guidance_arguments
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


AnyRequest = TypeVar("AnyRequest", bound=Hashable)


@dataclass
class Schedules(ABC, Generic[AnyRequest]):
    """Requests of one model, the answers that it gave to single ones, and schedules of them."""

    requests: list[AnyRequest]
    exact: Exactness = "off"  # off: rounding may differ
    auxiliary_lane: bool = False  # the VAE in a thread of its own: when it is done is not up to the schedule
    alone: dict[AnyRequest, Answer] = field(default_factory=dict)
    forwards: int = 0
    rows: int = 0
    unproven: int = 0  # requests that shared a forward in a batch size without a proof
    intercepted: bool = False
    engines: dict[tuple[int, bool], Engine] = field(default_factory=dict)  # by rows and kind of scheduler
    clock: Iterator[int] = field(default_factory=itertools.count)

    def close(self) -> None:
        """End the engines' threads."""
        for engine in self.engines.values():
            engine.close()

    @property
    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """The model's modules that park."""

    @abstractmethod
    def work(self, request: AnyRequest) -> Callable[[], Answer]:
        """The request's pipeline call."""

    @abstractmethod
    def job(self, request: AnyRequest) -> ScheduledJob:
        """The request as the scheduler sees it, without owner and urgency."""

    def expected(self, request: AnyRequest) -> Answer:
        """The answer alone: of the plain pipeline, or of a strict engine with no other."""
        if request not in self.alone:
            if self.exact == "off":
                self.alone[request] = self.work(request)()
            else:
                fiber = Fiber(self.work(request))
                self._run(Engine(StepScheduler(8), exact="strict"), [fiber])
                if fiber.failure is not None:
                    raise fiber.failure
                self.alone[request] = fiber.result
        return self.alone[request]

    def together(self, requests: list[AnyRequest], max_batch_size: int = 8) -> list[Fiber]:
        """All at once through one engine."""
        fibers = [Fiber(self.work(request)) for request in requests]
        scheduler = AnyOrder(max_batch_size, random.Random(0))
        self._run(Engine(scheduler, exact=self.exact), fibers)
        return fibers

    def _run(self, engine: Engine, fibers: list[Fiber]) -> None:
        self._intercept()
        for fiber in fibers:
            engine.start(fiber)
        while not engine.idle:
            engine.step()

    def _intercept(self) -> None:
        """For good: the modules are the bench's own."""
        if not self.intercepted:
            intercept(self.modules)
            if self.exact != "off":
                pad_small_linears(self.modules)
        self.intercepted = True

    def _engine(self, rows: int, rng: random.Random, *, any_order: bool) -> Engine:
        """An engine, which keeps what it has proven and learned from schedule to schedule, as a replica."""
        known = self.engines.get((rows, any_order))
        if known is None:
            scheduler = AnyOrder(rows, rng) if any_order else StepScheduler(rows)
            known = self.engines[rows, any_order] = Engine(
                scheduler,
                exact=self.exact,
                auxiliary_lane=self.auxiliary_lane,
                now=lambda: float(next(self.clock)),
            )
        return known

    def play(self, rng: random.Random) -> list[tuple[AnyRequest, Fiber]]:
        """A random schedule: joins between steps, cancels, trials of batch sizes; every other one by the real
        policy with users, priorities and deadlines, which preempt, the others in any order at all."""
        self._intercept()
        engine = self._engine(rng.choice([2, 3, 4, 8]), rng, any_order=rng.random() < 0.5)
        forwards, rows = engine.forwards, engine.rows
        fibers: list[tuple[AnyRequest, Fiber]] = []
        doomed: list[Fiber] = []
        to_come = rng.sample(self.requests, rng.randint(2, min(8, len(self.requests))))
        while to_come or not engine.idle:
            if to_come and (engine.idle or rng.random() < 0.7):
                request = to_come.pop()
                job = self.job(request)
                job.user, job.priority = rng.choice("abc"), rng.choice([-1, 0, 0, 1])
                job.deadline, job.submitted_at = rng.choice([None, None, 40.0]), float(next(self.clock))
                fiber = Fiber(self.work(request), job)
                fibers.append((request, fiber))
                engine.start(fiber)
                if rng.random() < 0.15:
                    doomed.append(fiber)
            engine.step()
            while rng.random() < 0.95 and engine.run_trial():
                pass  # as while nothing waits
            if doomed and rng.random() < 0.3:
                engine.cancel(doomed.pop())
        self.forwards += engine.forwards - forwards
        self.rows += engine.rows - rows
        self.unproven += sum(bool(fiber.unproven) for _, fiber in fibers)
        return fibers


@dataclass(kw_only=True)
class Bench(Schedules[ResolvedRequest]):
    """Image requests to one model."""

    model: DiffusersModel
    decode: bool = False  # to pictures, through the VAE

    @property
    def modules(self) -> list[nn.Module]:
        return self.model.modules

    def job(self, request: ResolvedRequest) -> ScheduledJob:
        return ScheduledJob(
            steps=request.num_inference_steps,
            batch_size=request.num_images,
            shape=(request.width, request.height),
        )

    def work(self, request: ResolvedRequest) -> Callable[[], Answer]:
        def call() -> Answer:
            pipeline = self.model.pipeline_for(request)
            image = IMAGE.resize((request.width, request.height)) if request.edit else None
            mask = MASK.resize((request.width, request.height)) if request.task is Task.inpaint else None
            size = request.width, request.height
            maps = [MAPS[control.type].resize(size) for control in request.controls]
            arguments: dict[str, Any] = call_arguments(type(pipeline), request, image, mask, maps)
            arguments |= guidance_arguments(pipeline, request)
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
