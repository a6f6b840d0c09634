"""Real pipeline calls on this CPU: the engine compared with sequential calls and request-level batches.

Arrivals are Poisson on a clock that is the thread's CPU time and skips idle time, so other processes on the
machine do not count. Two FLUX models: `small`, where eight rows cost about 3.5 times one (as 512 px on a
large GPU), and `large`, where they cost eight times one (as 1024 px). And `guided`, rows `....guided`: the
UNet of tiny-sdxl-base with classifier-free guidance, two rows a call, where eight rows cost about 2.9 times
two; it runs in the default mode, with batch sizes that were proven before the clock starts. Each request has
one guidance of five and one adapter of fifty (Zipf); the adapters' own arithmetic is in none of the policies.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import dataclasses
import os
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ledger
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from deployments.engine.batch_buckets import pad_small_linears
from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.intercept import intercept
from deployments.engine.scheduled_job import ParkedCall, ScheduledJob
from deployments.engine.step_scheduler import StepScheduler
from deployments.protocol.request import Exactness

STEPS = {4: 0.3, 8: 0.2, 20: 0.25, 28: 0.15, 50: 0.1}
ADAPTERS = 50
ROOT = Path(__file__).parent.parent
ROWS = 8
SLO = 3.0  # times the seconds that the request takes alone
PLOT = Path(__file__).parent / "plots" / "batching.svg"
NOTE = "real pipeline calls, one thread, clock = its CPU time, Poisson arrivals"


@dataclasses.dataclass(frozen=True)
class Flux:
    """A small FLUX.1-dev with random weights, without text encoders and VAE."""

    width: int  # of the transformer
    blocks: tuple[int, int]  # double, single
    pixels: int  # 16 px are one token
    exact: Exactness = "off"
    call_rows: int = 1
    guidances: tuple[float, ...] = (1.0, 2.5, 3.5, 5.0, 7.0)

    def template(self) -> Any:
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=self.blocks[0],
            num_single_layers=self.blocks[1],
            attention_head_dim=32,
            num_attention_heads=self.width // 32,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        )
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=transformer.eval(),
        )

    def denoiser(self, pipeline: Any) -> torch.nn.Module:
        found: torch.nn.Module = pipeline.transformer
        return found

    def embeddings(self, _pipeline: Any, generators: Sequence[torch.Generator]) -> dict[str, torch.Tensor]:
        return {
            "prompt_embeds": torch.cat([torch.randn(1, 16, 32, generator=one) for one in generators]),
            "pooled_prompt_embeds": torch.cat([torch.randn(1, 32, generator=one) for one in generators]),
        }


@dataclasses.dataclass(frozen=True)
class GuidedSdxl:
    """The UNet of tiny-sdxl-base; every call has a row with the prompt and a row without it."""

    pixels: int
    exact: Exactness = "prefer"
    call_rows: int = 2
    guidances: tuple[float, ...] = (1.5, 2.5, 3.5, 5.0, 7.0)

    def template(self) -> Any:
        folder = ROOT / "models/tiny-sdxl-base"
        return StableDiffusionXLPipeline(
            scheduler=EulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            vae=AutoencoderKL.from_pretrained(folder / "vae"),  # for its scale; nothing is decoded
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            unet=UNet2DConditionModel.from_pretrained(folder / "unet").eval(),
            add_watermarker=False,
        )

    def denoiser(self, pipeline: Any) -> torch.nn.Module:
        found: torch.nn.Module = pipeline.unet
        return found

    def embeddings(self, pipeline: Any, generators: Sequence[torch.Generator]) -> dict[str, torch.Tensor]:
        config = pipeline.unet.config
        width = config.cross_attention_dim
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

        def noise(*shape: int) -> torch.Tensor:
            return torch.cat([torch.randn(1, *shape, generator=one) for one in generators])

        return {
            "prompt_embeds": noise(16, width),
            "pooled_prompt_embeds": noise(pooled),
            "negative_prompt_embeds": noise(16, width),
            "negative_pooled_prompt_embeds": noise(pooled),
        }


Model = Flux | GuidedSdxl
MODELS: dict[str, Model] = {
    "small": Flux(64, (1, 2), 128),
    "large": Flux(256, (4, 8), 256),
    "guided": GuidedSdxl(128),
}


@dataclasses.dataclass(slots=True, eq=False)
class Request(ScheduledJob):
    """A scheduled job with the arguments of its pipeline call."""

    seed: int = 0
    guidance: float = 1.0
    adapter: int = 0


class CpuClock:
    """CPU seconds of this thread plus the idle time that was skipped."""

    def __init__(self) -> None:
        self._skipped_s = -time.thread_time()

    def now(self) -> float:
        return time.thread_time() + self._skipped_s

    def skip_to(self, moment: float) -> None:
        self._skipped_s += max(0.0, moment - self.now())


class OneAdapter(StepScheduler):
    """The oldest leads; only steps of equal guidance and adapter join it (the rule of vLLM-Omni)."""

    def pick(self, waiting: Sequence[ParkedCall], now: float = 0.0, *, observe: bool = True) -> list[int]:
        jobs: Any = [call.job for call in waiting]
        order = sorted(range(len(jobs)), key=lambda i: jobs[i].submitted_at)
        first = order[0]
        same = [
            i
            for i in order
            if waiting[i].key == waiting[first].key
            and (jobs[i].guidance, jobs[i].adapter) == (jobs[first].guidance, jobs[first].adapter)
        ]
        return same[: self.max_batch_size // waiting[first].batch_size]


def template(model: Model) -> Any:
    """The model's pipeline."""
    pipeline = model.template()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: Any, model: Model, requests: Sequence[Request], **more: Any) -> torch.Tensor:
    """Latents of requests with equal steps and guidance, in one pipeline call."""
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    latents: torch.Tensor = pipeline(
        **model.embeddings(pipeline, generators),
        height=model.pixels,
        width=model.pixels,
        num_inference_steps=requests[0].steps,
        guidance_scale=requests[0].guidance,
        generator=generators,
        output_type="latent",
        **more,
    ).images
    return latents


def arrivals(model: Model, count: int, per_second: float, seed: int) -> list[Request]:
    chance = random.Random(seed)
    popularity = [1 / (rank + 1) for rank in range(ADAPTERS)]
    now, requests = 0.0, []
    for number in range(count):
        now += chance.expovariate(per_second)
        requests.append(
            Request(
                user=f"user {number}",
                submitted_at=now,
                steps=chance.choices(list(STEPS), list(STEPS.values()))[0],
                shape="square",
                seed=number,
                guidance=chance.choice(model.guidances),
                adapter=chance.choices(range(ADAPTERS), popularity)[0],
            )
        )
    return requests


Policy = Callable[[Any, Model, Sequence[Request]], dict[Request, float]]  # when each one ended


def request_level(rows: int) -> Policy:
    """A policy: the oldest request and those of equal steps and guidance, up to `rows`, in one call."""

    def run(pipeline: Any, model: Model, requests: Sequence[Request]) -> dict[Request, float]:
        clock, waiting = CpuClock(), list(requests)
        ended: dict[Request, float] = {}
        while waiting:
            clock.skip_to(waiting[0].submitted_at)
            now, first = clock.now(), waiting[0]
            batch = [
                one
                for one in waiting
                if one.submitted_at <= now and (one.steps, one.guidance) == (first.steps, first.guidance)
            ][: max(1, rows // model.call_rows)]
            generate(pipeline, model, batch)
            ended.update(dict.fromkeys(batch, clock.now()))
            waiting = [one for one in waiting if one not in ended]
        return ended

    return run


def step_level(scheduler: Callable[[int], StepScheduler]) -> Policy:
    """A policy: the engine with this step scheduler."""

    def run(pipeline: Any, model: Model, requests: Sequence[Request]) -> dict[Request, float]:
        modules = [model.denoiser(pipeline)]
        restores = [intercept(modules)]
        clock, coming = CpuClock(), deque(requests)
        engine = Engine(scheduler(ROWS), exact=model.exact, now=lambda: clock.now())
        ended: dict[Request, float] = {}
        if model.exact != "off":
            restores.append(pad_small_linears(modules))
            warm_up(engine, pipeline, model)
            clock = CpuClock()
        while coming or not engine.idle:
            if engine.idle:
                clock.skip_to(coming[0].submitted_at)
            while coming and coming[0].submitted_at <= clock.now():
                engine.start(_fiber(pipeline, model, coming.popleft()))
            for fiber in engine.step():
                if fiber.failure is not None:
                    raise fiber.failure
                if fiber.done:
                    ended[fiber.job] = clock.now()  # type: ignore[index]
        for restore in restores:
            restore()
        return ended

    return run


def warm_up(engine: Engine, pipeline: Any, model: Model) -> None:
    """One short request, then the trials of batch sizes for its shape, as before a replica takes any."""
    request = Request(steps=2, guidance=model.guidances[0])
    engine.start(_fiber(pipeline, model, request))
    while not engine.idle:
        engine.step()
    while engine.run_trial(before_traffic=True):
        pass


def _fiber(pipeline: Any, model: Model, request: Request) -> Fiber:
    def at_step_end(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        request.steps_done = step + 1
        return tensors

    own = copy.copy(pipeline)
    vars(own)["scheduler"] = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    return Fiber(lambda: generate(own, model, [request], callback_on_step_end=at_step_end), request)


POLICIES: dict[str, Policy] = {
    "one after another": request_level(1),
    "request-level": request_level(ROWS),
    "step-level, one adapter": step_level(OneAdapter),
    "Weft": step_level(StepScheduler),
}


def seconds_alone(pipeline: Any, model: Model) -> dict[int, float]:
    """CPU seconds of a single call, by steps: interpolated from calls of 4 and 20 steps."""

    def seconds(steps: int) -> float:
        began = time.thread_time()
        generate(pipeline, model, [Request(steps=steps, guidance=model.guidances[-1])])
        return time.thread_time() - began

    seconds(4)  # warms up
    few, many = (min(seconds(steps) for _ in range(3)) for steps in (4, 20))
    return {steps: few + (steps - 4) * (many - few) / 16 for steps in STEPS}


def per_second_alone(alone: dict[int, float]) -> float:
    """Requests per second that sequential calls can do."""
    return 1 / sum(alone[steps] * share for steps, share in STEPS.items())


def p95(ended: dict[Request, float]) -> float:
    return statistics.quantiles([end - one.submitted_at for one, end in ended.items()], n=20)[18]


def mean(ended: dict[Request, float]) -> float:
    return statistics.mean(end - one.submitted_at for one, end in ended.items())


def slo(ended: dict[Request, float], alone: dict[int, float]) -> float:
    """Share of requests that ended within three times the seconds they take alone."""
    kept = [end - one.submitted_at <= SLO * alone[one.steps] for one, end in ended.items()]
    return sum(kept) / len(kept)


Compared = tuple[dict[str, list[dict]], dict[int, float]]


def compare(name: str, load: float, count: int, seeds: int) -> Compared:
    """Ends of all requests per policy and seed, with the same arrivals; the policies take turns."""
    model = MODELS[name]
    pipeline = template(model)
    alone = seconds_alone(pipeline, model)
    found: dict[str, list[dict]] = {policy: [] for policy in POLICIES}
    for seed in range(seeds):
        for policy, run in POLICIES.items():
            ended = run(pipeline, model, arrivals(model, count, load * per_second_alone(alone), seed))
            found[policy].append(ended)
            print(
                f"| {name} | {load} | {seed} | {policy} | {mean(ended):.3f} | {p95(ended):.3f} "
                f"| {slo(ended, alone):.3f} |",
                flush=True,
            )
    return found, alone


def paired(figure: Callable[[dict], float], ours: list[dict], theirs: list[dict]) -> list[float]:
    return [figure(one) / figure(other) for one, other in zip(ours, theirs, strict=True)]


def record(name: str, values: list[float], unit: str, note: str, dry: bool) -> None:
    spread = f"{min(values):.3f}-{max(values):.3f}"
    if dry:
        print(name, f"{statistics.median(values):.3f}", unit, spread)
    else:
        notes = f"{NOTE}; {note}; median of the seeds"
        ledger.record(name, statistics.median(values), unit, spread=spread, n=len(values), notes=notes)


def draw(found: dict[str, dict[str, list[dict]]]) -> None:
    """95th percentile and mean of every policy, one panel per model. Needs the extra `bench`."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "batching"
    figure, axes = pyplot.subplots(1, len(found), figsize=(11, 4.5))
    for axis, (name, policies) in zip(axes, found.items(), strict=True):
        for shift, (label, value) in enumerate((("mean", mean), ("95th percentile", p95))):
            heights = [statistics.median([value(ended) for ended in runs]) for runs in policies.values()]
            places = [place + 0.4 * shift for place in range(len(heights))]
            axis.bar(places, heights, width=0.4, label=label)
        axis.set_xticks([place + 0.2 for place in range(len(policies))], list(policies), rotation=15)
        axis.set_title(name)
        axis.set_ylabel("CPU seconds from arrival to end")
    axes[0].legend()
    figure.tight_layout()
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})


def through_serve(name: str, load: float, count: int, alone: dict[int, float]) -> list[float]:
    """Wall seconds of each request through a real `@serve.batch` on a local Ray."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else a token file is written to the home directory
    import ray
    from ray import serve

    model = MODELS[name]

    @serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 1})
    class Batched:
        def __init__(self) -> None:
            torch.set_num_threads(1)
            self._pipeline = template(model)
            with torch.inference_mode():
                generate(self._pipeline, model, [Request(steps=4)])

        @serve.batch(max_batch_size=ROWS, batch_wait_timeout_s=0.0)
        async def __call__(self, requests: list[tuple[int, float, int]]) -> list[bool]:
            await asyncio.to_thread(self._compute, requests)
            return [True] * len(requests)

        def _compute(self, requests: list[tuple[int, float, int]]) -> None:
            groups: dict[tuple[int, float], list[Request]] = {}
            for steps, guidance, seed in requests:
                request = Request(steps=steps, guidance=guidance, seed=seed)
                groups.setdefault((steps, guidance), []).append(request)
            with torch.inference_mode():
                for group in groups.values():
                    generate(self._pipeline, model, group)

    async def play(handle: Any) -> list[float]:
        async def one(request: Request) -> float:
            await asyncio.sleep(max(0.0, began + request.submitted_at - time.monotonic()))
            await handle.remote((request.steps, request.guidance, request.seed))
            return time.monotonic() - began - request.submitted_at

        requests = arrivals(model, count, load * per_second_alone(alone), 0)
        began = time.monotonic()
        return await asyncio.gather(*[one(request) for request in requests])

    ray.init(num_cpus=2, include_dashboard=False)
    serve.start(proxy_location="Disabled")
    handle = serve.run(Batched.bind(), name="batched", route_prefix=None)
    try:
        return asyncio.run(play(handle))
    finally:
        serve.shutdown()
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200, help="to the small model")
    parser.add_argument("--large-requests", type=int, default=40, help="to the large model")
    parser.add_argument("--guided-requests", type=int, default=100, help="to the guided model")
    parser.add_argument("--only", choices=["flux", "guided"], help="measure one of the two columns")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--serve", action="store_true", help="also Ray Serve's @serve.batch, in wall time")
    parser.add_argument("--dry", action="store_true", help="neither record nor draw")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    print("| model | load | seed | policy | mean s | p95 s | within 3x alone |\n|" + " --- |" * 7)
    if options.only != "flux":
        under_load("guided", options.guided_requests, options, suffix=".guided")
    if options.only != "guided":
        flux(options)
    print(f"took {time.monotonic() - began:.0f} s")


def under_load(name: str, count: int, options: argparse.Namespace, suffix: str = "") -> Compared:
    """Compare and record the policies at 1.5 times what one after another can do."""
    with torch.inference_mode():
        found, alone = compare(name, 1.5, count, options.seeds)
    ours = found["Weft"]
    note = f"{name} model at 1.5 times what one after another can do, {count} requests a seed"
    for policy, short in (("request-level", "request_level"), ("step-level, one adapter", "one_adapter")):
        ratios = paired(p95, ours, found[policy])
        record(f"batching_p95_vs_{short}{suffix}", ratios, "ratio", note, options.dry)
    record(f"batching_slo{suffix}", [slo(ended, alone) for ended in ours], "of 1", note, options.dry)
    return found, alone


def flux(options: argparse.Namespace) -> None:
    """The two FLUX models."""
    small, alone = under_load("small", options.requests, options)
    with torch.inference_mode():
        large, _ = compare("large", 0.8, options.large_requests, options.seeds)
    for name, figure in (("mean", mean), ("p95", p95)):
        ratios = paired(figure, large["Weft"], large["one after another"])
        note = (
            f"large model, where batching pays nothing, at 0.8 load, {options.large_requests} requests a seed"
        )
        record(f"batching_saturated_{name}_vs_one_after_another", ratios, "ratio", note, options.dry)
    if options.serve:
        waits = through_serve("small", 1.5, options.requests, alone)
        real = statistics.quantiles(waits, n=20)[18]
        ratio = p95(small["request-level"][0]) / real
        note = (
            f"check of the simulated request-level policy: its p95 over that of @serve.batch ({real:.2f} s)"
        )
        record("batching_request_level_vs_serve_batch", [ratio], "ratio", note, options.dry)
    if not options.dry:
        draw({"small model, 1.5 load": small, "large model, 0.8 load": large})


if __name__ == "__main__":
    main()
