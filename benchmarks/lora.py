"""What LoRAs cost: eight different ones in a forward against none, against peft, and against switching.

The forwards are real, of the shipped tiny FLUX at 128 px with rank-16 adapters on all linear layers of its
blocks; what they cost is CPU time. The traffic is played on a virtual clock with the times measured before:
Poisson arrivals, adapters drawn by Zipf's law, the same oldest-first order for both rules; only who may share
a forward differs. The plot needs the extra `bench` (matplotlib).
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import hashlib
import heapq
import random
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ledger
import numpy as np
import torch
from diffusers import FluxPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import save
from torch import Tensor, nn

from deployments.adapters.bank import Bank, Room
from deployments.adapters.mixed import Mix, Mixer, mix
from deployments.adapters.source import read
from deployments.engine.engine import Engine
from deployments.engine.intercept import intercept
from deployments.engine.owners import owned
from deployments.engine.row_counts import pad_small_linears
from deployments.engine.step_scheduler import Job, StepScheduler
from deployments.engine.worker import Emit, Worker
from deployments.protocol.request import Lora

ROOT = Path(__file__).parent.parent
PLOT = Path(__file__).parent / "plots" / "lora.svg"
MODEL = ROOT / "models/tiny-flux-schnell"
ROWS, RANK, STEPS = 8, 16, 4
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
    made = FluxPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
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


def forward_of(transformer: Any, rows: int) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)
    config = transformer.config

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    given = {
        "hidden_states": noise(rows, 64, config.in_channels),
        "encoder_hidden_states": noise(rows, 64, config.joint_attention_dim),
        "pooled_projections": noise(rows, config.pooled_projection_dim),
        "timestep": torch.full((rows,), 0.5),
        "img_ids": torch.zeros(64, 3),
        "txt_ids": torch.zeros(64, 3),
        "guidance": torch.full((rows,), 3.5) if config.guidance_embeds else None,
        "return_dict": False,
    }
    return partial(transformer, **given)


def medians(cases: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median CPU seconds of each case, and of its ratio to the first within a round; taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        for _ in range(3):
            case()
    for _ in range(rounds):
        for name, case in cases.items():
            began = time.thread_time()  # one thread computes; wall time would tell of the neighbours
            case()
            seconds[name].append(time.thread_time() - began)
    first = seconds[next(iter(cases))]
    return {
        name: (
            statistics.median(taken),
            statistics.median([t / f for t, f in zip(taken, first, strict=True)]),
        )
        for name, taken in seconds.items()
    }


def with_peft(transformer: Any, loras: Sequence[dict[str, Tensor]]) -> Any:
    """A copy in which peft mixes adapters by row: its adapter_names argument, given to every layer."""
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


def measure_forwards(rounds: int, *, keep: bool) -> tuple[list[float], float]:
    """Seconds of a forward of 1..8 rows with LoRAs, and of reading a cold adapter."""
    plain = pipeline()
    transformer = plain.transformer
    loras = [lora_tensors(transformer, seed) for seed in range(ROWS)]
    files = [save(tensors) for tensors in loras]
    peft = with_peft(transformer, loras)
    switched = copy.deepcopy(plain)
    restores = [pad_small_linears([transformer])]
    mixer = Mixer({"transformer": transformer}, deterministic=True)
    owners: list[Mix] = []
    began = time.perf_counter()
    for file in files:
        factors = read(file, plain).factors
        mixer.hook(factors)
        owners.append(mix([(factors, 1.0)]))
    load_s = (time.perf_counter() - began) / len(files)

    def mixed(chosen: Sequence[Mix | None]) -> Callable[[], Any]:
        return partial(owned, chosen, [1] * len(chosen), forward_of(transformer, len(chosen)))

    eight = forward_of(transformer, ROWS)
    results = medians(
        {
            "none": eight,
            "eight_same": mixed([owners[0]] * ROWS),
            "eight_different": mixed(owners),
            "four_of_eight": mixed([*owners[:4], None, None, None, None]),
        },
        rounds,
    )
    against = medians(
        {"none": forward_of(peft_base(plain), ROWS), "peft_adapter_names": forward_of(peft, ROWS)}, rounds
    )
    for name, (seconds, ratio) in [*results.items(), ("peft_adapter_names", against["peft_adapter_names"])]:
        print(f"forward of {ROWS} rows, {name:20} {1000 * seconds:8.2f} ms  {ratio:.3f} x none", flush=True)
        if keep and name != "none":
            note = f"tiny FLUX, 128 px, {ROWS} rows, rank {RANK}; CPU time over that without adapters"
            ledger.record(f"lora_{name}", ratio, "x", n=rounds, notes=note)
    for name, seconds in switching(switched, loras, max(3, rounds // 20)).items():
        print(f"{name:30} {1000 * seconds:8.2f} ms", flush=True)
        if keep:
            ledger.record(
                f"lora_{name}_ms", 1000 * seconds, "ms", notes="tiny FLUX, one adapter, diffusers alone"
            )
    print(f"{'reading a file for the bank':30} {1000 * load_s:8.2f} ms", flush=True)
    if keep:
        ledger.record("lora_read_ms", 1000 * load_s, "ms", n=len(files), notes="off the engine's thread")
    times = medians({str(rows): mixed(owners[:rows]) for rows in range(1, ROWS + 1)}, rounds)
    for restore in restores:
        restore()
    return [seconds for seconds, _ in times.values()], load_s


def peft_base(plain: Any) -> Any:
    """The transformer as peft's copy has it: without the engine's padded layers and hooks."""
    return FluxPipeline.from_pretrained(MODEL, torch_dtype=torch.float32).transformer


def switching(switched: Any, loras: Sequence[dict[str, Tensor]], rounds: int) -> dict[str, float]:
    """Median seconds in which diffusers' own ways change the adapter of the whole pipeline."""
    loads, sets = [], []
    for index in range(rounds):
        began = time.perf_counter()
        switched.load_lora_weights(dict(loras[index % ROWS]), adapter_name="one")
        switched.unload_lora_weights()
        loads.append(time.perf_counter() - began)
    for index in range(2):
        switched.load_lora_weights(dict(loras[index]), adapter_name=f"a{index}")
    for index in range(rounds):
        began = time.perf_counter()
        switched.set_adapters([f"a{index % 2}"])
        sets.append(time.perf_counter() - began)
    return {"load_and_unload": statistics.median(loads), "set_adapters": statistics.median(sets)}


# --- traffic ----------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Visitor:
    """One request of the traffic: four steps with one adapter."""

    adapter: int
    arrives_s: float
    ready_s: float = 0.0  # when its adapter is there
    steps_left: int = STEPS
    ended_s: float = 0.0


def traffic(
    adapters: int, load: float, requests: int, forward_s: Sequence[float], seed: int
) -> list[Visitor]:
    """load: of what forwards of eight rows could serve if everything could share."""
    rng = random.Random(seed)
    weights = [1 / rank for rank in range(1, adapters + 1)]
    between_s = STEPS * forward_s[-1] / ROWS / load
    at, visitors = 0.0, []
    for adapter in rng.choices(range(adapters), weights, k=requests):
        at += rng.expovariate(1 / between_s)
        visitors.append(Visitor(adapter, at))
    return visitors


def play(
    visitors: list[Visitor], rule: str, forward_s: Sequence[float], load_s: float, in_memory: int
) -> list[float]:
    """Seconds from arrival to end of each visitor; adapters are read one after another, beside the steps."""
    memory: OrderedDict[int, float] = OrderedDict()  # adapter -> when it is there
    reader_free_s = 0.0
    for visitor in visitors:
        known = memory.pop(visitor.adapter, None)
        if known is None:
            reader_free_s = known = max(reader_free_s, visitor.arrives_s) + load_s
        memory[visitor.adapter] = known
        if len(memory) > in_memory:
            memory.popitem(last=False)
        visitor.ready_s = max(visitor.arrives_s, known)
    coming = [(visitor.ready_s, index, visitor) for index, visitor in enumerate(visitors)]
    heapq.heapify(coming)
    active: list[Visitor] = []
    now = 0.0
    while coming or active:
        if not active:
            now = max(now, coming[0][0])
        while coming and coming[0][0] <= now:
            active.append(heapq.heappop(coming)[2])
        active.sort(key=lambda visitor: visitor.arrives_s)
        mates = [one for one in active if rule == RULES[0] or one.adapter == active[0].adapter][:ROWS]
        now += forward_s[len(mates) - 1]
        for mate in mates:
            mate.steps_left -= 1
            if not mate.steps_left:
                mate.ended_s = now
                active.remove(mate)
    return [visitor.ended_s - visitor.arrives_s for visitor in visitors]


def measure_traffic(forward_s: Sequence[float], load_s: float, requests: int, *, keep: bool) -> None:
    loads = (0.3, 0.5, 0.7, 0.9)
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
                    note = "virtual clock, Zipf(1), 4 steps, measured forward and loading times"
                    ledger.record(name, p95, "s", n=len(latencies), notes=note)
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

    async for _ in worker.submit(work, Job(steps=steps)):
        pass
    return list(np.diff(ends))


class Served:
    """Files by digest, at hand."""

    def __init__(self, files: Sequence[bytes]) -> None:
        self.files = {hashlib.sha256(file).hexdigest(): file for file in files}

    async def read(self, digest: str) -> bytes:
        return self.files[digest]


async def measure_cold_loads(steps: int, rounds: int, *, keep: bool) -> None:
    plain = pipeline()
    transformer = plain.transformer
    served = Served([save(lora_tensors(transformer, seed)) for seed in range(32)])
    mixer = Mixer({"transformer": transformer}, deterministic=True)
    bank = Bank(plain, mixer, torch.device("cpu"), served, Room(on_device=8, in_memory=8))
    restores = [intercept([transformer]), pad_small_linears([transformer])]
    scheduler = StepScheduler(ROWS)
    worker = Worker(Engine(scheduler, deterministic=True), scheduler, slots=8)
    forward = forward_of(transformer, ROWS)
    quiet: list[float] = []
    loading: list[float] = []
    loads = 0

    async def load_on(stop: asyncio.Event) -> int:
        count = 0
        while not stop.is_set():
            for digest in served.files:  # 32 in turns through 8 places: every one is cold
                async with bank.using([Lora(id=digest)], worker.call):
                    count += 1
                if stop.is_set():
                    break
        return count

    await step_times(worker, forward, steps)  # rows are proven, hooks are set
    async with bank.using([Lora(id=next(iter(served.files)))], worker.call):
        pass
    for _ in range(rounds):
        quiet += await step_times(worker, forward, steps)
        stop = asyncio.Event()
        loader = asyncio.ensure_future(load_on(stop))
        loading += await step_times(worker, forward, steps)
        stop.set()
        loads += await loader
    worker.stop()
    for restore in restores:
        restore()
    for name, share in (("p50", 50), ("p99", 99)):
        before, after = np.percentile(quiet, share), np.percentile(loading, share)
        print(f"step {name}: {1000 * before:.2f} ms, while adapters load {1000 * after:.2f} ms", flush=True)
        if keep:
            note = f"{loads} cold adapters of rank {RANK} beside {len(loading)} steps of {ROWS} rows"
            ledger.record(f"lora_cold_load_step_{name}", after / before, "x", n=len(loading), notes=note)
    held = bank.held
    print(f"held: {held}", flush=True)
    if keep:
        note = f"{held.on_device} adapters on the device, rank {RANK}, tiny FLUX"
        ledger.record("lora_device_bytes", held.device_bytes / max(1, held.on_device), "bytes", notes=note)
    bank.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="forwards of each kind, in turns")
    parser.add_argument("--requests", type=int, default=2000, help="of the traffic, five times")
    parser.add_argument(
        "--steps", type=int, default=300, help="measured beside cold loads, in each of 6 rounds"
    )
    parser.add_argument("--dry", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep = not options.dry
    with torch.inference_mode():
        forward_s, load_s = measure_forwards(options.rounds, keep=keep)
        measure_traffic(forward_s, load_s, options.requests, keep=keep)
        asyncio.run(measure_cold_loads(options.steps, 6 if keep else 1, keep=keep))


if __name__ == "__main__":
    main()
