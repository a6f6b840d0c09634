"""Seconds from the start of a replica's process to its first image, by phase; weights in the page cache.

process: until Python runs our first line. imports: torch, diffusers and our modules. load: weights on the
device, seams in place. warm_up: the card's sizes once, batch sizes proven. first_picture: the first request,
encoded.

A replica is a process like these plus the time that Ray takes to place it. --graph measures that as well: the
whole graph with the model scaled to zero, from a synchronous call to its image. --compile also measures the
card with `compile: true`, on a node without compiled code and on one that has it.

    python benchmarks/cold_start.py [--cards tiny-flux-schnell,tiny-sdxl-base] [--graph] [--compile]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ledger

ROOT = Path(__file__).parent.parent
PHASES = ("process", "imports", "load", "warm_up", "first_picture")


def replica(card_id: str, spawned: float, compiled: bool) -> dict[str, float]:
    """In the child: seconds of each phase. spawned: time.time() of the parent."""
    began = time.time()
    sys.path.insert(0, str(ROOT))
    from deployments.protocol.card import load_cards
    from deployments.protocol.events import Artifact
    from deployments.protocol.request import GenerationRequest
    from deployments.replica import ModelReplica

    card = load_cards(ROOT / "configs/models")[card_id]
    if compiled:
        serving = card.serving.model_copy(update={"compile": True, "lora": "none"})
        card = card.model_copy(update={"serving": serving, "adapters": []})
    model = ModelReplica([card])
    ready = time.time()

    async def picture() -> None:
        request = GenerationRequest(model=card_id, prompt="a red circle", seed=1)
        events = [event async for event in model.generate(request)]
        assert any(isinstance(event, Artifact) for event in events), events[-1]

    asyncio.run(picture())
    done = time.time()
    inside = ready - began
    phases = dict(model.start_phases)
    phases["imports"] += inside - sum(phases.values())  # those of this file, before the constructor
    return {"process": began - spawned, **phases, "first_picture": done - ready}


def one_run(card_id: str, *more: str, **environment: str) -> dict[str, float]:
    """One fresh process."""
    command = [sys.executable, __file__, "--replica", card_id, "--spawned", repr(time.time()), *more]
    env = os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def through_the_graph(card_id: str) -> tuple[float, float]:
    """Seconds from a synchronous call to the image: without a replica, and with one."""
    import httpx
    import yaml

    sys.path.insert(0, str(ROOT))
    from serve_app.ray_serve import local_cluster
    from serve_app.redis.embedded import EmbeddedRedis

    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"]["port"] = 18_123
    serving = {"min_replicas": 0, "num_gpus": 0}
    config["applications"][0]["args"]["models"] = [{"id": card_id, "serving": serving}]
    with tempfile.TemporaryDirectory() as data:
        valkey = EmbeddedRedis(Path(data))
        os.environ |= {"WEFT_DATA_DIR": data, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
        os.environ["REDIS_URL"] = valkey.start()
        try:
            with local_cluster.local_ray(num_cpus=4):
                assert local_cluster.deploy(config, print)
                times = []
                for seed in (1, 2):
                    body = {"model": card_id, "prompt": "a red circle", "seed": seed}
                    began = time.perf_counter()
                    answer = httpx.post(
                        "http://127.0.0.1:18123/v1/images/generations", json=body, timeout=300
                    )
                    answer.raise_for_status()
                    times.append(time.perf_counter() - began)
                return times[0], times[1]
        finally:
            valkey.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cards", default="tiny-flux-schnell,tiny-sdxl-base")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--dry", action="store_true", help="Print, and record nothing.")
    parser.add_argument("--replica", help=argparse.SUPPRESS)
    parser.add_argument("--spawned", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.replica:
        print(json.dumps(replica(options.replica, options.spawned, options.compile)))
        return

    def report(name: str, values: list[float], notes: str = "") -> None:
        spread = f"{min(values):.2f}..{max(values):.2f}"
        if options.dry:
            print(f"{name} = {statistics.median(values):.3f} s  {spread}  {notes}")
        else:
            ledger.record(name, statistics.median(values), "s", spread=spread, n=len(values), notes=notes)

    for card_id in options.cards.split(","):
        runs = [one_run(card_id) for _ in range(options.runs)]
        for phase in PHASES:
            report(f"cold_start_{phase}_s.{card_id}", [run[phase] for run in runs])
        report(f"cold_start_s.{card_id}", [sum(run.values()) for run in runs], "process to first picture")
        if options.compile:
            with tempfile.TemporaryDirectory() as cache:
                for where in ("first", "again"):
                    run = one_run(card_id, "--compile", WEFT_MODEL_CACHE=cache)
                    name, notes = f"cold_start_compiled_{where}_s", "process to first picture, compile: true"
                    report(f"{name}.{card_id}", [sum(run.values())], notes)
        if options.graph:
            cold, warm = through_the_graph(card_id)
            report(
                f"cold_start_graph_s.{card_id}", [cold], f"HTTP, from no replica; the next takes {warm:.2f} s"
            )


if __name__ == "__main__":
    main()
