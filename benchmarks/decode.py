"""Step intervals of a request while other requests' images are decoded: auxiliary lane against taking turns.

Real calls of tiny-flux-dev: one request of 50 steps, and beside it short ones (4 steps) one after the other,
so that an image is decoded every few steps. The two variants alternate. Rows `..._aside` are the auxiliary
lane.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import ledger
import torch

from deployments.engine.batch_buckets import pad_small_linears
from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.intercept import intercept
from deployments.engine.scheduled_job import ScheduledJob
from deployments.engine.step_scheduler import StepScheduler
from deployments.models.load import load_pipeline
from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.protocol.card import load_card
from deployments.protocol.request import GenerationRequest, ResolvedRequest, Task
from deployments.validation.resolve import resolve

CARD = Path(__file__).parent.parent / "configs" / "models" / "tiny-flux-dev.yaml"
LONG, SHORT = 50, 4  # steps
SHORT_AT_ONCE = 2  # short requests at once


def resolved_request(card: Any, steps: int, seed: int) -> ResolvedRequest:
    request = GenerationRequest(
        model=card.id, prompt="a red circle", num_inference_steps=steps, guidance_scale=3.0, seed=seed
    )
    return resolve(request, card, fresh_seed=0).request


def fiber(model: DiffusersModel, request: ResolvedRequest, done_at: list[float]) -> Fiber:
    job = ScheduledJob(steps=request.num_inference_steps, shape="square", submitted_at=time.monotonic())

    def on_step(step: int, _steps: int) -> None:
        job.steps_done = step
        done_at.append(time.perf_counter())

    return Fiber(partial(model.call, request, on_step, None, None, []), job)


def step_gaps_ms(model: DiffusersModel, card: Any, *, auxiliary_lane: bool) -> tuple[list[float], int]:
    """Milliseconds between the steps of the long request, and how many short ones were finished."""
    scheduler = StepScheduler(4)
    engine = Engine(scheduler, exact="prefer", auxiliary_lane=auxiliary_lane)
    done_at: list[float] = []
    long = fiber(model, resolved_request(card, LONG, 0), done_at)
    engine.start(long)
    others: list[Fiber] = []
    finished = 0
    while not long.done:
        finished += sum(one.done for one in others)
        others = [one for one in others if not one.done]
        while len(others) < SHORT_AT_ONCE:
            others.append(fiber(model, resolved_request(card, SHORT, 1 + finished + len(others)), []))
            engine.start(others[-1])
        engine.step()
    while not engine.idle:
        engine.step()
    engine.close()
    return [1e3 * (b - a) for a, b in itertools.pairwise(done_at)], finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dry", action="store_true", help="record nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    card = load_card(CARD)
    model = DiffusersModel(load_pipeline(card.weights, torch.device("cpu")), [Task.t2i])
    intercept(model.modules)
    pad_small_linears(model.modules)
    gaps: dict[bool, list[float]] = {True: [], False: []}
    finished = {True: 0, False: 0}
    with torch.inference_mode():
        for auxiliary in (True, False):
            step_gaps_ms(model, card, auxiliary_lane=auxiliary)  # warms up
        for _ in range(options.rounds):
            for auxiliary in (True, False):
                found, ended = step_gaps_ms(model, card, auxiliary_lane=auxiliary)
                gaps[auxiliary] += found
                finished[auxiliary] += ended
    for auxiliary, name in ((True, "aside"), (False, "in_turn")):
        p50, p99 = statistics.median(gaps[auxiliary]), statistics.quantiles(gaps[auxiliary], n=100)[98]
        note = (
            f"tiny-flux-dev, a request of {LONG} steps with {SHORT_AT_ONCE} of {SHORT} beside it, decoding"
            f" {name}; {finished[auxiliary]} pictures decoded; longest {max(gaps[auxiliary]):.0f} ms"
        )
        if options.dry:
            print(f"{name}: p50 {p50:.1f} ms, p99 {p99:.1f} ms; {note}")
        else:
            ledger.record(f"decode_step_gap_p50_ms_{name}", p50, "ms", n=len(gaps[auxiliary]), notes=note)
            ledger.record(f"decode_step_gap_p99_ms_{name}", p99, "ms", n=len(gaps[auxiliary]), notes=note)


if __name__ == "__main__":
    main()
