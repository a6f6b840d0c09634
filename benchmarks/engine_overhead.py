"""CPU cost of the engine per step boundary: a null denoiser with FLUX's arguments, 1 to 64 requests.

CPU seconds of the engine's thread, not wall time. The line through the medians gives a fixed cost per
forward and a cost per active request; the tensors are tiny, so that copying them hardly counts.

Two costs outside the engine are measured separately and not subtracted: the request's own code with its two
fiber switches, and the tensor operations that stack and split the rows.
With --memory it measures memory: live tensors, live fibers and resident memory after many requests.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import ledger
import numpy as np
import torch
from greenlet import getcurrent
from torch import Tensor, nn

from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.intercept import intercept
from deployments.engine.scheduled_job import ParkedCall, ScheduledJob
from deployments.engine.step_scheduler import StepScheduler

ACTIVE = (1, 2, 4, 8, 16, 32, 64)
ROWS = 8  # of a forward, in measure_active
WARM_UP = 20  # first step boundaries, not counted: the scheduler still learns


class NullDenoiser(nn.Module):
    """Takes the arguments of FluxTransformer2DModel and returns its input."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor,
        joint_attention_kwargs: dict[str, object] | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        return (hidden_states,)


class ParkingDenoiser(nn.Module):
    """Parks the fiber and returns the value it is resumed with: a seam without an engine."""

    def forward(self, hidden_states: Tensor, **others: object) -> tuple[Tensor]:
        return cast(tuple[Tensor], cast(Any, getcurrent()).parent.switch())


class AlwaysTogether(StepScheduler):
    """Puts all waiting calls into one forward, so that choosing costs nothing."""

    def pick(self, waiting: Sequence[ParkedCall], now: float = 0.0, *, observe: bool = True) -> list[int]:
        return list(range(len(waiting)))

    def record_forward(
        self,
        key: Hashable | None,
        rows: int,
        seconds: float,
        jobs: Sequence[ScheduledJob] = (),
        now: float = 0.0,
    ) -> None:
        """Learns nothing."""


class LearnedToShare(StepScheduler):
    """The real scheduler, with 10 ms as the time of every forward, so that larger batches always pay."""

    def record_forward(
        self,
        key: Hashable | None,
        rows: int,
        seconds: float,
        jobs: Sequence[ScheduledJob] = (),
        now: float = 0.0,
    ) -> None:
        super().record_forward(key, rows, 0.01, jobs, now)


def request(denoiser: nn.Module, steps: int) -> None:
    """The denoising loop of one request, with nothing but the module calls."""
    latents = torch.zeros(1, 4, 4)
    text, pooled = torch.zeros(1, 4, 4), torch.zeros(1, 4)
    img_ids, txt_ids = torch.zeros(4, 3), torch.zeros(4, 3)
    guidance = torch.full((1,), 3.5)
    for step in range(steps):
        latents = denoiser(
            hidden_states=latents,
            timestep=torch.full((1,), float(step)),
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=txt_ids,
            img_ids=img_ids,
            joint_attention_kwargs={},
            return_dict=False,
        )[0]


def engine_us(make: Callable[[int], StepScheduler], deterministic: bool, active: int, steps: int) -> float:
    """Median CPU microseconds of one step boundary with `active` requests."""
    denoiser = NullDenoiser()
    restore = intercept([denoiser])
    engine = Engine(make(64), exact="prefer" if deterministic else "off")
    if deterministic:
        prove(engine, denoiser, active)
    for _ in range(active):
        engine.start(Fiber(partial(request, denoiser, steps)))
    seconds: list[float] = []
    full: list[bool] = []  # forwards with every request in them
    while not engine.idle:
        began = time.thread_time()
        moved = engine.step()
        seconds.append(time.thread_time() - began)
        full.append(len(moved) == active and not moved[0].done)
    restore()
    counted = [cost for cost, all_in in zip(seconds, full, strict=True) if all_in][WARM_UP:]
    return 1e6 * statistics.median(counted)


def prove(engine: Engine, denoiser: nn.Module, active: int) -> None:
    """Prove all batch sizes that so many requests fill."""
    for _ in range(3):  # larger sizes are tried once so many rows have waited
        for _ in range(active):
            engine.start(Fiber(partial(request, denoiser, WARM_UP)))
        while not engine.idle:
            engine.step()
        while engine.run_trial():
            pass


def switching_us(active: int, steps: int) -> float:
    """Median CPU microseconds of the same requests parked and resumed by a plain loop."""
    denoiser = ParkingDenoiser()
    fibers = [Fiber(partial(request, denoiser, steps)) for _ in range(active)]
    for fiber in fibers:
        fiber.switch()
    answer = (torch.zeros(1, 4, 4),)
    seconds: list[float] = []
    while not fibers[0].done:
        began = time.thread_time()
        for fiber in fibers:
            fiber.switch(answer)
        seconds.append(time.thread_time() - began)
    return 1e6 * statistics.median(seconds[WARM_UP:-1])


def tensors_us(active: int, steps: int) -> float:
    """Median CPU microseconds of stacking two small tensors per request and splitting one."""
    latents = [torch.zeros(1, 4, 4) for _ in range(active)]
    times = [torch.zeros(1) for _ in range(active)]
    sizes = [1] * active
    seconds: list[float] = []
    for _ in range(steps):
        began = time.thread_time()
        joined = torch.cat(latents)
        torch.cat(times)
        torch.split_with_sizes_copy(joined, sizes)
        seconds.append(time.thread_time() - began)
    return 1e6 * statistics.median(seconds[WARM_UP:])


def line(measure: Callable[[int, int], float], steps: int, rounds: int) -> tuple[float, float, str]:
    """Fixed microseconds, microseconds per active request, and the medians over all rounds as text."""
    costs = [statistics.median(measure(active, steps) for _ in range(rounds)) for active in ACTIVE]
    slope, fixed = np.polyfit(ACTIVE, costs, 1)
    words = ", ".join(f"{n}: {cost:.0f}" for n, cost in zip(ACTIVE, costs, strict=True))
    return float(fixed), float(slope), words


def measure_speed(steps: int, rounds: int, *, record: bool) -> None:
    rows: list[tuple[str, str, Callable[[int, int], float]]] = [
        ("request code and switches, no engine", "switching", switching_us),
        ("joining and dealing tensors, no engine", "tensors", tensors_us),
        ("always shares", "", partial(engine_us, AlwaysTogether, False)),
        ("always shares, deterministic", "deterministic", partial(engine_us, AlwaysTogether, True)),
        ("step scheduler", "scheduled", partial(engine_us, LearnedToShare, False)),
        ("step scheduler, deterministic", "served", partial(engine_us, LearnedToShare, True)),
    ]
    for name, suffix, measure in rows:
        fixed, slope, words = line(measure, steps, rounds)
        print(f"{name:40} fixed {fixed:6.1f} us, per request {slope:5.2f} us; {words}", flush=True)
        if record:
            end = f"_{suffix}" if suffix else ""
            notes = f"{name}; CPU time, us per step boundary by active requests: {words}"
            ledger.record(f"engine_step_us{end}", fixed, "us", n=steps * rounds, notes=notes)
            ledger.record(f"engine_per_request_us{end}", slope, "us", n=steps * rounds, notes=notes)


def measure_memory(requests: int, steps: int, *, record: bool) -> None:
    """Run short requests, 64 at a time, through one engine and measure what remains allocated."""
    denoiser = NullDenoiser()
    restore = intercept([denoiser])
    engine = Engine(LearnedToShare(64), exact="prefer")
    done = 0

    def serve(until: int) -> None:
        nonlocal done
        active = 0
        while done < until or active:
            while active < 64 and done < until:
                engine.start(Fiber(partial(request, denoiser, steps)))
                active, done = active + 1, done + 1
            active -= sum(fiber.done for fiber in engine.step())

    serve(requests // 10)  # allocators and the scheduler's tables fill up
    before = (*alive(), resident_bytes())
    serve(done + requests)
    after = (*alive(), resident_bytes())
    restore()
    grown = [new - old for new, old in zip(after, before, strict=True)]
    print(f"{requests} requests of {steps} steps, 64 at a time; alive before and after, once collected:")
    print(f"  tensors {before[0]} -> {after[0]}, fibers {before[1]} -> {after[1]}")
    print(f"  resident {before[2] / 2**20:.1f} -> {after[2] / 2**20:.1f} MiB")
    if record:
        ledger.record("engine_tensors_left", grown[0], "tensors", n=requests)
        ledger.record("engine_fibers_left", grown[1], "fibers", n=requests)
        ledger.record("engine_memory_growth", grown[2] / 2**20, "MiB", n=requests)


def measure_active(active: int, *, record: bool) -> None:
    """Measure tensors alive between two steps of `active` requests of FLUX's size at 1024 px.

    The ratio is to the requests' own tensors. It includes one stack of the embeddings of the last batch.
    """
    denoiser = NullDenoiser()
    restore = intercept([denoiser])
    engine = Engine(LearnedToShare(ROWS), exact="prefer")

    def work() -> None:
        latents = torch.zeros(1, 4096, 64, dtype=torch.bfloat16)
        text = torch.zeros(1, 512, 4096, dtype=torch.bfloat16)
        pooled = torch.zeros(1, 768, dtype=torch.bfloat16)
        img_ids, txt_ids = torch.zeros(4096, 3), torch.zeros(512, 3)
        for step in range(40):
            latents = denoiser(
                hidden_states=latents,
                timestep=torch.full((1,), float(step)),
                guidance=torch.full((1,), 3.5),
                pooled_projections=pooled,
                encoder_hidden_states=text,
                txt_ids=txt_ids,
                img_ids=img_ids,
            )[0]

    for _ in range(active):
        engine.start(Fiber(work))
    own = tensor_bytes()
    full = 0
    while full < active // ROWS:
        full += len(engine.step()) == ROWS
    ratio = tensor_bytes() / own
    while not engine.idle:
        engine.step()
    restore()
    note = (
        f"{active} active requests, {own / 2**20:.0f} MiB of latents, embeddings and ids; forwards of {ROWS}"
    )
    print(f"tensors alive are {ratio:.2f} of the requests' own: {note}")
    if record:
        ledger.record("engine_active_memory", ratio, "of the requests' own tensors", n=active, notes=note)


def tensor_bytes() -> int:
    """Bytes of all tensors alive; shared memory counts once."""
    gc.collect()
    storages = {
        thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()
        for thing in gc.get_objects()
        if issubclass(type(thing), Tensor)
    }
    return sum(storages.values())


def alive() -> tuple[int, int]:
    """Numbers of tensors and fibers that exist after a garbage collection."""
    gc.collect()
    kinds = [type(thing) for thing in gc.get_objects()]
    return sum(issubclass(kind, Tensor) for kind in kinds), sum(issubclass(kind, Fiber) for kind in kinds)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=None, help="of each request: 200, or 4 for --memory")
    parser.add_argument("--rounds", type=int, default=5, help="per figure; the median is kept")
    parser.add_argument(
        "--memory", action="store_true", help="measure memory that many short requests leave allocated"
    )
    parser.add_argument("--requests", type=int, default=10_000, help="for --memory")
    parser.add_argument("--dry", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        if options.memory:
            measure_memory(options.requests, options.steps or 4, record=not options.dry)
            measure_active(64, record=not options.dry)
        else:
            measure_speed(options.steps or 200, options.rounds, record=not options.dry)


if __name__ == "__main__":
    main()
