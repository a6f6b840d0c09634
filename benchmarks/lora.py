"""Cost of LoRAs: eight different ones in a forward compared with none, with peft, and with switching.

The forwards are real: the shipped tiny FLUX at 128 px with rank-16 adapters on all linear layers of its
blocks, measured in CPU time. The traffic is simulated on a virtual clock with these times: Poisson arrivals,
adapters drawn by Zipf's law, oldest first under both rules; only the calls that may share a forward differ.
The plot needs the extra `bench` (matplotlib).
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import hashlib
import heapq
import itertools
import random
import statistics
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ledger
import numpy as np
import psutil
import torch
from diffusers import FluxPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import save
from torch import Tensor, nn

from deployments.engine.batch_buckets import pad_small_linears
from deployments.engine.engine import Engine
from deployments.engine.intercept import intercept
from deployments.engine.lora_rows import run_with_lora_rows
from deployments.engine.scheduled_job import ScheduledJob
from deployments.engine.step_scheduler import StepScheduler
from deployments.engine.work import Emit
from deployments.engine.worker import Worker
from deployments.loras.batched_lora import BatchedLora
from deployments.loras.cache import LoraCache, LoraCacheLimits
from deployments.loras.lora_set import LoraSet, combine
from deployments.loras.source import read_lora
from deployments.protocol.request import Lora
from deployments.runtime import SWITCH_INTERVAL_S

ROOT = Path(__file__).parent.parent
PLOT = Path(__file__).parent / "plots" / "lora.svg"
MODEL = ROOT / "models/tiny-flux-schnell"
ROWS, RANK, STEPS = 8, 16, 4
COLD_ROWS = 2  # batch size of the steps during which adapters are read
COLD_A_SECOND = {"cold": 4.0, "cold_flood": float("inf")}  # adapters not used before, by row
SWAPS = 1000
REGISTERED = 1000
TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "proj_mlp",
    "proj_out",
    "net.0.proj",
    "net.2",
)
RULES = ("mixed", "one adapter per batch")


def pipeline() -> Any:
    made = FluxPipeline.from_pretrained(MODEL, dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


def lora_tensors(transformer: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for path, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and path.endswith(TARGETS) and "blocks" in path:
            a = torch.randn(RANK, layer.in_features, generator=generator)
            b = 0.01 * torch.randn(layer.out_features, RANK, generator=generator)
            tensors |= {f"transformer.{path}.lora_A.weight": a, f"transformer.{path}.lora_B.weight": b}
    return tensors


def forward_of(transformer: Any, rows: int, tokens: int = 64) -> partial[Any]:
    generator = torch.Generator().manual_seed(0)
    config = transformer.config

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    given = {
        "hidden_states": noise(rows, tokens, config.in_channels),
        "encoder_hidden_states": noise(rows, 64, config.joint_attention_dim),
        "pooled_projections": noise(rows, config.pooled_projection_dim),
        "timestep": torch.full((rows,), 0.5),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(64, 3),
        "guidance": torch.full((rows,), 3.5) if config.guidance_embeds else None,
        "return_dict": False,
    }
    return partial(transformer, **given)


@dataclass(frozen=True, slots=True)
class Cost:
    """Median CPU seconds of a case, and its ratio to the first case within a round: median and quartiles."""

    seconds: float
    ratio: float
    quartiles: tuple[float, float]
    rounds: int

    def __str__(self) -> str:
        low, high = self.quartiles
        return f"{1000 * self.seconds:8.2f} ms  {self.ratio:.3f} ({low:.3f}-{high:.3f}) x the first"


def record(name: str, cost: Cost, notes: str) -> None:
    low, high = cost.quartiles
    ledger.record(name, cost.ratio, "x", spread=f"{low:.3f}-{high:.3f}", n=cost.rounds, notes=notes)


def medians(cases: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Cost]:
    """Cost of each case; the cases take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        for _ in range(3):
            case()
    for _ in range(rounds):
        for name, case in cases.items():
            began = time.thread_time()  # one thread computes; wall time would include other processes
            case()
            seconds[name].append(time.thread_time() - began)
    first = seconds[next(iter(cases))]
    found = {}
    for name, taken in seconds.items():
        ratios = [t / f for t, f in zip(taken, first, strict=True)]
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        found[name] = Cost(statistics.median(taken), float(middle), (float(low), float(high)), rounds)
    return found


def with_peft(transformer: Any, loras: Sequence[dict[str, Tensor]]) -> Any:
    """A copy in which peft applies an adapter per row: adapter_names is passed to every layer."""
    copied = copy.deepcopy(transformer)
    for index, tensors in enumerate(loras):
        copied.load_lora_adapter(dict(tensors), adapter_name=f"a{index}")
    names = [f"a{index}" for index in range(len(loras))]
    for layer in copied.modules():
        if isinstance(layer, LoraLayer):
            layer.register_forward_pre_hook(
                lambda _layer, args, kwargs: (args, {**kwargs, "adapter_names": names}), with_kwargs=True
            )
    return copied.eval()


@dataclass(slots=True)
class Bench:
    """The tiny FLUX as the engine serves it, with eight adapters."""

    pipeline: Any
    loras: list[dict[str, Tensor]]
    owners: list[LoraSet]
    load_s: float  # of reading one file and converting it

    @classmethod
    def made(cls) -> Bench:
        plain = pipeline()
        loras = [lora_tensors(plain.transformer, seed) for seed in range(ROWS)]
        files = [save(tensors) for tensors in loras]
        batched_lora = BatchedLora({"transformer": plain.transformer}, deterministic=True)
        pad_small_linears([plain.transformer])
        owners, began = [], time.thread_time()
        for file in files:
            factors = read_lora(file, plain).factors
            batched_lora.hook(factors)
            owners.append(combine([(factors, 1.0)]))
        return cls(plain, loras, owners, (time.thread_time() - began) / len(files))

    def forward(self, owners: Sequence[LoraSet | None], tokens: int = 64) -> Callable[[], Any]:
        plain = forward_of(self.pipeline.transformer, len(owners), tokens)
        return partial(run_with_lora_rows, owners, [1] * len(owners), plain) if any(owners) else plain


def measure_mixed(bench: Bench, rounds: int, *, keep: bool) -> None:
    """Measure eight rows with different adapters, with one adapter, and half without, over eight without."""
    no_adapters: list[LoraSet | None] = [None] * ROWS
    for tokens, times in ((64, rounds), (256, rounds // 2)):
        cases = {
            "none": bench.forward(no_adapters, tokens),
            "8_distinct": bench.forward(bench.owners, tokens),
            "8_same": bench.forward([bench.owners[0]] * ROWS, tokens),
            "4_of_8": bench.forward([*bench.owners[:4], *no_adapters[4:]], tokens),
        }
        for name, case in medians(cases, times).items():
            print(f"{tokens} tokens, {ROWS} rows, {name:11} {case}", flush=True)
            if keep and name != "none":
                note = f"tiny FLUX, {tokens} tokens, {ROWS} rows, rank {RANK}; CPU time over none"
                record(f"lora_{name}_ratio" + ("" if tokens == 256 else f"_{tokens}"), case, note)


def measure_peft(bench: Bench, rounds: int, *, keep: bool) -> None:
    """Measure Weft's and peft's forwards with adapters over one without; peft runs on its own copy."""
    cases = {
        "none": forward_of(untouched(), ROWS),
        "ours": bench.forward(bench.owners),
        "peft": forward_of(with_peft(untouched(), bench.loras), ROWS),
    }
    found = medians(cases, rounds)
    for name, case in found.items():
        print(f"{ROWS} rows, 64 tokens, {name:11} {case}", flush=True)
    added = (found["ours"].ratio - 1) / (found["peft"].ratio - 1)
    whole = found["ours"].ratio / found["peft"].ratio
    print(
        f"over peft's adapter_names: what adapters add {added:.3f}, the whole forward {whole:.3f}", flush=True
    )
    if keep:
        note = f"tiny FLUX, 64 tokens, {ROWS} different adapters of rank {RANK}; CPU time"
        ledger.record(
            "lora_vs_peft_ratio", added, "x", n=rounds, notes=f"{note} that adapters add to a forward"
        )
        ledger.record(
            "lora_vs_peft_forward_ratio", whole, "x", n=rounds, notes=f"{note} of the whole forward"
        )
        record("lora_peft_ratio", found["peft"], f"{note} of peft's adapter_names over none")


def untouched() -> Any:
    """The transformer without the engine's padded layers and hooks."""
    return pipeline().transformer


def measure_merged(bench: Bench, rounds: int, *, keep: bool) -> None:
    """Measure what merging adapters would save and cost; see docs/decisions/0011-no-merged-adapters.md."""
    transformer, owner = bench.pipeline.transformer, bench.owners[0]
    for tokens, rows in ((64, 1), (64, ROWS), (256, ROWS)):
        plain = bench.forward([None] * rows, tokens)  # a merged forward is a plain one with other weights
        cases = {"beside": bench.forward([owner] * rows, tokens), "merged": plain}
        found = medians(cases, rounds // 2)
        print(f"{tokens} tokens, {rows} rows, merged over beside {found['merged']}", flush=True)
        if keep:
            note = f"tiny FLUX, {tokens} tokens, {rows} rows of one adapter; CPU time over unmerged"
            record(f"lora_merged_ratio_{tokens}_tokens_{rows}_rows", found["merged"], note)
    weights = {place: transformer.get_submodule(place[1]).weight for place in owner.layers}
    kept = {place: weight.clone() for place, weight in weights.items()}
    taken = []
    for index in range(SWAPS):
        began = time.thread_time()
        for place, total in bench.owners[index % ROWS].layers.items():
            for part in total.parts:
                weights[place].addmm_(part.b, part.a, alpha=part.scale)
        for place, weight in weights.items():
            weight.copy_(kept[place])
        taken.append(time.thread_time() - began)
    assert all(torch.equal(weight, kept[place]) for place, weight in weights.items())
    swap_ms = 1000 * statistics.median(taken)
    print(f"merging and restoring {swap_ms:.2f} ms", flush=True)
    if keep:
        note = f"{len(weights)} layers, base kept as a copy and bit-identical after {SWAPS} swaps; CPU time"
        ledger.record("lora_merge_and_restore_ms", swap_ms, "ms", n=SWAPS, notes=note)


def measure_switching(bench: Bench, rounds: int, *, keep: bool) -> None:
    for name, seconds in switching(pipeline(), bench.loras, rounds).items():
        print(f"{name:30} {1000 * seconds:8.2f} ms", flush=True)
        if keep:
            note = "tiny FLUX, one adapter, diffusers alone; CPU time in which the model can do nothing else"
            ledger.record(f"lora_{name}_ms", 1000 * seconds, "ms", n=rounds, notes=note)
    print(f"{'reading a file for the cache':30} {1000 * bench.load_s:8.2f} ms", flush=True)
    if keep:
        ledger.record(
            "lora_read_ms", 1000 * bench.load_s, "ms", n=ROWS, notes="CPU time off the engine's thread"
        )


def switching(switched: Any, loras: Sequence[dict[str, Tensor]], rounds: int) -> dict[str, float]:
    """Median CPU seconds that diffusers' own methods take to change the adapter of a pipeline."""
    loads, sets = [], []
    for index in range(rounds):
        began = time.thread_time()
        switched.load_lora_weights(dict(loras[index % ROWS]), adapter_name="one")
        switched.unload_lora_weights()
        loads.append(time.thread_time() - began)
    for index in range(2):
        switched.load_lora_weights(dict(loras[index]), adapter_name=f"a{index}")
    for index in range(rounds):
        began = time.thread_time()
        switched.set_adapters([f"a{index % 2}"])
        sets.append(time.thread_time() - began)
    return {"load_and_unload": statistics.median(loads), "set_adapters": statistics.median(sets)}


# --- traffic ----------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class SimulatedRequest:
    """One request of the traffic: four steps with one adapter."""

    adapter: int
    arrives_s: float
    ready_s: float = 0.0  # when its adapter is loaded
    steps_left: int = STEPS
    ended_s: float = 0.0


def traffic(
    adapters: int, load: float, requests: int, forward_s: Sequence[float], seed: int
) -> list[SimulatedRequest]:
    """load: fraction of the throughput of full forwards of eight rows."""
    rng = random.Random(seed)
    weights = [1 / rank for rank in range(1, adapters + 1)]
    between_s = STEPS * forward_s[-1] / ROWS / load
    at, arrivals = 0.0, []
    for adapter in rng.choices(range(adapters), weights, k=requests):
        at += rng.expovariate(1 / between_s)
        arrivals.append(SimulatedRequest(adapter, at))
    return arrivals


def play(
    arrivals: list[SimulatedRequest], rule: str, forward_s: Sequence[float], load_s: float, in_memory: int
) -> list[float]:
    """Seconds from arrival to end of each request; adapters are read one after another during the steps."""
    memory: OrderedDict[int, float] = OrderedDict()  # adapter -> when it is loaded
    reader_free_s = 0.0
    for request in arrivals:
        known = memory.pop(request.adapter, None)
        if known is None:
            reader_free_s = known = max(reader_free_s, request.arrives_s) + load_s
        memory[request.adapter] = known
        if len(memory) > in_memory:
            memory.popitem(last=False)
        request.ready_s = max(request.arrives_s, known)
    coming = [(request.ready_s, index, request) for index, request in enumerate(arrivals)]
    heapq.heapify(coming)
    active: list[SimulatedRequest] = []
    now = 0.0
    while coming or active:
        if not active:
            now = max(now, coming[0][0])
        while coming and coming[0][0] <= now:
            active.append(heapq.heappop(coming)[2])
        active.sort(key=lambda request: request.arrives_s)
        batch = [one for one in active if rule == RULES[0] or one.adapter == active[0].adapter][:ROWS]
        now += forward_s[len(batch) - 1]
        for member in batch:
            member.steps_left -= 1
            if not member.steps_left:
                member.ended_s = now
                active.remove(member)
    return [request.ended_s - request.arrives_s for request in arrivals]


def measure_traffic(forward_s: Sequence[float], load_s: float, requests: int, *, keep: bool) -> None:
    loads = (0.3, 0.5, 0.7, 0.9)
    note = f"virtual clock, Zipf(1), {STEPS} steps, forward and reading times measured before"
    curves: dict[tuple[int, str], list[float]] = {}
    for adapters in (50, 1000):
        for rule in RULES:
            for load in loads:
                latencies = [
                    latency
                    for seed in range(5)
                    for latency in play(
                        traffic(adapters, load, requests, forward_s, seed), rule, forward_s, load_s, 64
                    )
                ]
                p95 = float(np.percentile(latencies, 95))
                curves.setdefault((adapters, rule), []).append(p95)
                print(f"{adapters:5} adapters, load {load}, {rule:22} p95 {1000 * p95:9.1f} ms", flush=True)
                if keep:
                    name = f"lora_zipf_{adapters}_{'mixed' if rule == RULES[0] else 'apart'}_p95_at_{load}"
                    ledger.record(name, p95, "s", n=len(latencies), notes=note)
        ratios = [mixed / apart for mixed, apart in zip(*(curves[adapters, r] for r in RULES), strict=True)]
        for load, ratio in zip(loads, ratios, strict=True):
            print(f"{adapters:5} adapters, load {load}, p95 mixed over apart {ratio:.3f}", flush=True)
            if keep:
                about = f"{note}; p95 over that of one adapter per batch"
                ledger.record(
                    f"lora_zipf_{adapters}_p95_ratio_at_{load}", ratio, "x", n=5 * requests, notes=about
                )
    if keep:
        draw(loads, curves)


def draw(loads: Sequence[float], curves: dict[tuple[int, str], list[float]]) -> None:
    import matplotlib
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "lora"  # equal figures, equal file
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, adapters in zip(axes, (50, 1000), strict=True):
        for rule in RULES:
            axis.plot(loads, curves[adapters, rule], marker="o", label=rule)
        axis.set_yscale("log")
        axis.set_title(f"{adapters} adapters, Zipf(1)")
        axis.set_xlabel("load (1: full forwards are just enough)")
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set_ylabel("95th percentile, seconds from arrival to end")
    axes[0].legend()
    figure.suptitle("Different LoRAs in one batch against one LoRA per batch; virtual clock, measured times")
    figure.tight_layout()
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})


# --- steps of others while a cold adapter loads -------------------------------------------------------------


async def step_times(worker: Worker, forward: Callable[[], Any], steps: int) -> list[float]:
    """Seconds between the steps of one running request."""
    ends: list[float] = []

    def work(_emit: Emit) -> None:
        for _ in range(steps):
            forward()
            ends.append(time.perf_counter())

    async for _ in worker.submit(work, ScheduledJob(steps=steps)):
        pass
    return list(np.diff(ends))


class FilesByDigest:
    """Files by digest, in memory."""

    def __init__(self, files: Sequence[bytes]) -> None:
        self.files = {hashlib.sha256(file).hexdigest(): file for file in files}

    async def read(self, digest: str) -> bytes:
        return self.files[digest]


async def measure_cold_loads(steps: int, rounds: int, *, keep: bool) -> None:
    plain = pipeline()
    transformer = plain.transformer
    served = FilesByDigest([save(lora_tensors(transformer, seed)) for seed in range(32)])
    batched_lora = BatchedLora({"transformer": transformer}, deterministic=True)
    lora_cache = LoraCache(
        plain, batched_lora, torch.device("cpu"), served, LoraCacheLimits(on_device=8, in_memory=8)
    )
    restores = [intercept([transformer]), pad_small_linears([transformer])]
    scheduler = StepScheduler(ROWS)
    worker = Worker(Engine(scheduler, exact="prefer"), scheduler, slots=8)
    forward = forward_of(transformer, COLD_ROWS)
    files = itertools.cycle(served.files)  # 32 in turn through 8 slots: each one is cold
    quiet: list[float] = []
    loading: dict[str, list[float]] = {row: [] for row in COLD_A_SECOND}
    loads = Counter[str]()

    async def load_on(row: str, stop: asyncio.Event) -> None:
        while not stop.is_set():
            async with lora_cache.using([Lora(id=next(files))], worker.run_on_thread):
                loads[row] += 1
            await asyncio.sleep(1 / COLD_A_SECOND[row])

    await step_times(worker, forward, steps)  # batch sizes are proven, hooks are set
    async with lora_cache.using([Lora(id=next(files))], worker.run_on_thread):
        pass
    for _ in range(rounds):
        quiet += await step_times(worker, forward, steps)
        for row, times in loading.items():
            stop = asyncio.Event()
            loader = asyncio.ensure_future(load_on(row, stop))
            times += await step_times(worker, forward, steps)
            stop.set()
            await loader
    worker.stop()
    for restore in restores:
        restore()
    for row, times in loading.items():
        for name, share in (("p50", 50), ("p99", 99)):
            before, after = np.percentile(quiet, share), np.percentile(times, share)
            summary = f"step {name}: {1000 * before:.2f} ms alone, {1000 * after:.2f} ms while adapters load"
            note = (
                f"{loads[row]} cold adapters of rank {RANK} beside {len(times)} steps; wall time; {summary}"
            )
            if keep:
                ledger.record(f"lora_{row}_step_{name}_ratio", after / before, "x", n=len(times), notes=note)
            else:
                print(f"lora_{row}_step_{name}_ratio = {after / before:.3f}; {note}", flush=True)
    lora_cache.close()


class GeneratedFiles:
    """Many files by digest, each made when it is read."""

    def __init__(self, tensors: dict[str, Tensor], count: int) -> None:
        self._tensors = tensors
        self.digests = {hashlib.sha256(self._file(number)).hexdigest(): number for number in range(count)}

    async def read(self, digest: str) -> bytes:
        return self._file(self.digests[digest])

    def _file(self, number: int) -> bytes:
        return save(self._tensors, {"number": str(number)})


async def measure_memory(count: int, *, keep: bool) -> None:
    """Measure memory of a cache of 8 slots and 64 in memory after each of many adapters was used once."""

    async def at_once(function: Callable[[], Any]) -> Any:
        return function()

    plain, process = pipeline(), psutil.Process()
    registered = GeneratedFiles(lora_tensors(plain.transformer, 0), count)
    batched_lora = BatchedLora({"transformer": plain.transformer}, deterministic=True)
    lora_cache = LoraCache(
        plain, batched_lora, torch.device("cpu"), registered, LoraCacheLimits(on_device=8, in_memory=64)
    )
    full = 0
    for index, digest in enumerate(registered.digests):
        async with lora_cache.using([Lora(id=digest)], at_once):
            if index == 127:  # both levels are full, and the allocator has grown
                full = process.memory_info().rss
    held, grown = lora_cache.usage, (process.memory_info().rss - full) / 2**20
    one = held.memory_bytes / max(1, held.in_memory) / 2**20
    print(
        f"after {count} adapters of {one:.2f} MiB: {held}; resident memory +{grown:.1f} MiB since 128",
        flush=True,
    )
    if keep:
        note = f"{count} adapters of {one:.2f} MiB used in turn, 64 in memory, 8 on the device"
        ledger.record(
            "lora_held_mib", (held.memory_bytes + held.device_bytes) / 2**20, "MiB", n=count, notes=note
        )
        ledger.record(
            "lora_resident_growth_mib", grown, "MiB", n=count, notes=f"{note}; after all since after 128"
        )
    lora_cache.close()


def measure_forwards(options: argparse.Namespace, *, keep: bool) -> None:
    """Measure the cost of adapters in a forward, alternatives to it, and simulated traffic."""
    bench = Bench.made()
    measure_mixed(bench, options.rounds, keep=keep)
    measure_peft(bench, options.rounds // 2, keep=keep)
    measure_merged(bench, options.rounds, keep=keep)
    measure_switching(bench, max(3, options.rounds // 6), keep=keep)
    rows = {str(n): bench.forward(bench.owners[:n]) for n in range(1, ROWS + 1)}
    forward_s = [cost.seconds for cost in medians(rows, options.rounds // 2).values()]
    measure_traffic(forward_s, bench.load_s, options.requests, keep=keep)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="forwards of each kind, in turns")
    parser.add_argument("--requests", type=int, default=2000, help="of the traffic, five times")
    parser.add_argument("--steps", type=int, default=250, help="measured beside cold loads, in each round")
    parser.add_argument("--registered", type=int, default=REGISTERED, help="adapters used in turn")
    parser.add_argument("--dry", action="store_true", help="print only")
    parser.add_argument("--only-cache", action="store_true", help="cold loads and memory")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as in a replica
    keep = not options.dry
    with torch.inference_mode():
        if not options.only_cache:
            measure_forwards(options, keep=keep)
        asyncio.run(measure_cold_loads(options.steps, 6 if keep else 1, keep=keep))
        asyncio.run(measure_memory(options.registered, keep=keep))


if __name__ == "__main__":
    main()
