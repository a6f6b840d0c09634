"""How many of the rows that fit into one forward share it, for requests with guidance of one family."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import nn

from deployments.engine.batch_buckets import pad_small_linears
from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.intercept import intercept
from deployments.engine.scheduled_job import ParkedCall, ScheduledJob
from deployments.engine.step_scheduler import StepScheduler
from tests.inference.families import PROMPTS, Family

GUIDANCES = (3.0, 5.0, 7.5)
REQUESTS = 8
MAX_ROWS = 8


class LargerIsFaster(StepScheduler):
    """The scheduler that serves, on a device where every larger forward has more rows per second: what a GPU
    does with pictures that do not fill it, and a CPU does not. Counts rows per key."""

    def __init__(self) -> None:
        super().__init__(MAX_ROWS)
        self.forwards: Counter[Hashable] = Counter()
        self.rows: Counter[Hashable] = Counter()
        self.fitting: Counter[Hashable] = Counter()  # rows of waiting calls that one forward could have taken

    def pick(self, waiting: Sequence[ParkedCall], now: float = 0.0, *, observe: bool = True) -> list[int]:
        picked = super().pick(waiting, now, observe=observe)
        key = waiting[picked[0]].key
        if key is not None:
            self.forwards[key] += 1
            self.rows[key] += sum(waiting[i].batch_size for i in picked)
            total = sum(call.batch_size for call in waiting if call.key == key)
            rows = waiting[picked[0]].batch_size
            self.fitting[key] += min(total, MAX_ROWS // rows * rows)
        return picked

    def record_forward(
        self,
        key: Hashable | None,
        batch_size: int,
        seconds: float,
        jobs: Sequence[ScheduledJob] = (),
        now: float = 0.0,
    ) -> None:
        super().record_forward(key, batch_size, 0.1 + batch_size / 1000, jobs, now)


def merge_share(family: Family) -> float:
    """Rows of the denoiser's forwards over the rows that fit, in the default mode, after a warm-up request.

    REQUESTS requests with guidance, of different steps and guidance, all at once.
    """
    torch.manual_seed(0)
    pipeline = family.build()
    modules = [part.eval() for part in pipeline.components.values() if isinstance(part, nn.Module)]
    scheduler = LargerIsFaster()
    engine = Engine(scheduler, exact="prefer")
    restores = [intercept(modules), pad_small_linears(modules)]
    try:
        with torch.inference_mode():
            _run(engine, [_work(family, pipeline, 0, 2)])
            while engine.run_trial(before_traffic=True):
                pass
            _run(engine, [_work(family, pipeline, seed, 8 + seed) for seed in range(REQUESTS)])
    finally:
        for restore in restores:
            restore()
    denoiser = scheduler.forwards.most_common(1)[0][0]
    return scheduler.rows[denoiser] / scheduler.fitting[denoiser]


def _run(engine: Engine, works: Sequence[Callable[[], Any]]) -> None:
    fibers = [Fiber(work) for work in works]
    for fiber in fibers:
        engine.start(fiber)
    while not engine.idle:
        engine.step()
    for fiber in fibers:
        if fiber.failure is not None:
            raise fiber.failure


def _work(family: Family, template: Any, seed: int, steps: int) -> Callable[[], Any]:
    assert family.guidance is not None
    arguments = {
        **family.common,
        **family.size,
        "prompt": PROMPTS[seed % len(PROMPTS)],
        "num_inference_steps": steps,
        family.guidance: GUIDANCES[seed % len(GUIDANCES)],
        "output_type": "latent",
    }

    def call() -> Any:
        pipeline = copy.copy(template)
        vars(pipeline)["scheduler"] = copy.deepcopy(template.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(**arguments, generator=torch.Generator().manual_seed(seed))

    return call
