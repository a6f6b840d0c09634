"""How long a request's step waits while the pictures of others are decoded: aside, and taking turns.

Real calls of tiny-flux-dev: one request of 50 steps, and beside it short ones (4 steps) that come one after
the other, so that a picture is decoded every few steps.  Aside and turns alternate.
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

from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.intercept import intercept
from deployments.engine.row_counts import pad_small_linears
from deployments.engine.step_scheduler import Job, StepScheduler
from deployments.pipelines.model import Model
from deployments.protocol.card import load_card
from deployments.protocol.limits import fit
from deployments.protocol.request import FittedRequest, GenerationRequest, Task
from deployments.weights.load import load_pipeline

CARD = Path(__file__).parent.parent / "configs" / "models" / "tiny-flux-dev.yaml"
LONG, SHORT = 50, 4  # steps
COMPANY = 2  # short requests at once


def wish(card: Any, steps: int, seed: int) -> FittedRequest:
    request = GenerationRequest(
        model=card.id, prompt="a red circle", num_inference_steps=steps, guidance_scale=3.0, seed=seed
    )
    return fit(request, card, fresh_seed=0).request


def fiber(model: Model, request: FittedRequest, done_at: list[float]) -> Fiber:
    job = Job(steps=request.num_inference_steps, shape="square", submitted_at=time.monotonic())

    def on_step(step: int, _steps: int) -> None:
        job.steps_done = step
        done_at.append(time.perf_counter())

    return Fiber(partial(model.call, request, on_step, None, None, []), job)


def step_gaps_ms(model: Model, card: Any, *, aside: bool) -> tuple[list[float], int]:
    """Milliseconds between the steps of the long request, and how many short ones were finished."""
    scheduler = StepScheduler(4)
    engine = Engine(scheduler, deterministic=True, aside=aside)
    done_at: list[float] = []
    long = fiber(model, wish(card, LONG, 0), done_at)
    engine.start(long)
    company: list[Fiber] = []
    finished = 0
    while not long.over:
        finished += sum(one.over for one in company)
        company = [one for one in company if not one.over]
        while len(company) < COMPANY:
            company.append(fiber(model, wish(card, SHORT, 1 + finished + len(company)), []))
            engine.start(company[-1])
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
    model = Model(load_pipeline(card.weights, torch.device("cpu")), [Task.t2i])
    intercept(model.modules)
    pad_small_linears(model.modules)
    gaps: dict[bool, list[float]] = {True: [], False: []}
    finished = {True: 0, False: 0}
    with torch.inference_mode():
        for aside in (True, False):
            step_gaps_ms(model, card, aside=aside)  # warms up
        for _ in range(options.rounds):
            for aside in (True, False):
                found, ended = step_gaps_ms(model, card, aside=aside)
                gaps[aside] += found
                finished[aside] += ended
    for aside, name in ((True, "aside"), (False, "in_turn")):
        p50, p99 = statistics.median(gaps[aside]), statistics.quantiles(gaps[aside], n=100)[98]
        note = (
            f"tiny-flux-dev, a request of {LONG} steps with {COMPANY} of {SHORT} beside it, decoding {name}; "
            f"{finished[aside]} pictures decoded meanwhile; longest {max(gaps[aside]):.0f} ms"
        )
        if options.dry:
            print(f"{name}: p50 {p50:.1f} ms, p99 {p99:.1f} ms; {note}")
        else:
            ledger.record(f"decode_step_gap_p50_ms_{name}", p50, "ms", n=len(gaps[aside]), notes=note)
            ledger.record(f"decode_step_gap_p99_ms_{name}", p99, "ms", n=len(gaps[aside]), notes=note)


if __name__ == "__main__":
    main()
