"""CPU time per job of what a fleet shares: Valkey, its writers, and the autoscaling policy.

Processor time, not wall time, so that a busy machine changes little; docs/scaling.md calculates with it.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

import ledger
from ray.serve.config import AutoscalingConfig, AutoscalingContext
from redis.asyncio import Redis
from store import MODEL, accept

from serve_app.jobs.store.store import JobStore
from serve_app.ray_serve.autoscaling import (
    DONE_S,
    OPEN_REQUESTS,
    REMAINING_S,
    REQUEST_S,
    BacklogPolicy,
    ReportedDemand,
)
from serve_app.ray_serve.private_api import DeploymentID, ReplicaID, TimeStampedValue
from serve_app.redis.embedded import EmbeddedRedis
from serve_app.redis.transactions import connect
from serve_app.settings import Settings

STEPS = 28  # of each job, one heartbeat each
REPLICAS = 64


async def jobs(url: str, folder: Path, number: int) -> dict[str, tuple[float, str]]:
    settings = Settings(
        data_dir=folder, redis_url=url, max_pending=10 * number, max_active_per_owner=10 * number
    )
    redis = connect(url)
    store = JobStore(redis, settings)
    found: dict[str, tuple[float, str]] = {}
    memory = (await redis.info("memory"))["used_memory"]
    server, client = await _cpu_s(redis), time.process_time()
    for owner in range(number):
        await accept(store, f"owner {owner % 100}")
    claims = [await store.leases.claim({MODEL: 1}) for _ in range(number)]
    taken = [claim for claim in claims if claim is not None]
    found["scaling_valkey_bytes_per_job"] = (
        ((await redis.info("memory"))["used_memory"] - memory) / number,
        "bytes",
    )
    middle = await _cpu_s(redis), time.process_time()
    for claim in taken:
        for step in range(1, STEPS + 1):
            await store.leases.heartbeat(claim, step=step, steps=STEPS)
    steps = await _cpu_s(redis), time.process_time()
    for claim in taken:
        await store.leases.complete(claim, [], 1.0)
    end = await _cpu_s(redis), time.process_time()
    heartbeats = steps[0] - middle[0], steps[1] - middle[1]
    found["scaling_valkey_us_per_job"] = 1e6 * (end[0] - server - heartbeats[0]) / number, "us"
    found["scaling_front_us_per_job"] = 1e6 * (end[1] - client - heartbeats[1]) / number, "us"
    found["scaling_valkey_us_per_step"] = 1e6 * heartbeats[0] / number / STEPS, "us"
    found["scaling_front_us_per_step"] = 1e6 * heartbeats[1] / number / STEPS, "us"
    await redis.aclose()
    return found


async def _cpu_s(redis: Redis) -> float:
    info = await redis.info("cpu")
    return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])


def policy_us(decisions: int) -> float:
    """CPU time of one decision about 64 replicas."""
    deployment = DeploymentID(name="Model", app_name="app")
    ids = [ReplicaID(f"r{number}", deployment) for number in range(REPLICAS)]
    policy = BacklogPolicy()
    policy.read_demand = lambda *_: ReportedDemand(1000, REPLICAS, 0.0)
    config = AutoscalingConfig(min_replicas=0, max_replicas=2 * REPLICAS)
    contexts = []
    for number in range(decisions):
        values = {DONE_S: 0.7 * number, REMAINING_S: 3.0, OPEN_REQUESTS: 2.0, REQUEST_S: 4.0}
        contexts.append(
            AutoscalingContext(
                deployment_id=deployment,
                deployment_name="Model",
                app_name="app",
                current_num_replicas=REPLICAS,
                target_num_replicas=REPLICAS,
                running_replicas=ids,
                total_num_requests=128.0,
                total_queued_requests=0.0,
                aggregated_metrics=None,
                raw_metrics={
                    name: {replica: [TimeStampedValue(0.0, value)] for replica in ids}
                    for name, value in values.items()
                },
                capacity_adjusted_min_replicas=0,
                capacity_adjusted_max_replicas=2 * REPLICAS,
                policy_state={},
                last_scale_up_time=None,
                last_scale_down_time=None,
                current_time=float(number),
                config=config,
            )
        )
    began = time.process_time()
    for context in contexts:
        policy(context)
    return 1e6 * (time.process_time() - began) / decisions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--dry", action="store_true", help="record nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder)) as url:
        found = asyncio.run(jobs(url, Path(folder), options.jobs))
    found["scaling_policy_us"] = policy_us(1000), "us"
    for name, (value, unit) in found.items():
        print(f"{name} = {value:.4g} {unit}", flush=True)
        if not options.dry:
            ledger.record(name, value, unit, n=options.jobs, notes="processor time")


if __name__ == "__main__":
    main()
