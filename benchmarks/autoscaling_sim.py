"""Weft's autoscaling policy and Ray's own, under production-shaped arrivals on a virtual clock.

Simulated are arrivals, one first-come-first-served queue, replicas that each do one second of work per
second, cold starts, and reports every 10 s as in Serve. The policies are real: BacklogPolicy of
serve_app/ray_serve/autoscaling.py and Ray's default function, both called through Ray's own wrapper with
Ray's own AutoscalingContext and AutoscalingConfig; only the clock that Ray's module reads is simulated.

SLO: a request is ended within 60 s of its arrival, or within 3 times the work it needs where that is longer.
Ideal GPU-hours: the work itself, as if a GPU existed only while it is busy. No policy can reach 1.0.
GPU-hours: from the moment a replica is requested (cold start included) until it is removed.
A day is simulated per seed, until its last request has ended; every request counts.

Arrivals are sessions of users, each at its own steady rate for a time of random length, and one quiet stretch
a day. Their parameters were chosen so that the coefficient of variation of the gaps and the indices of
dispersion are close to those published for production, which are printed with them. The policy's defaults
were chosen on the days of seeds 1 to 3; others are reported.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import statistics
import types
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ledger
import numpy as np
from ray.serve import autoscaling_policy as rays
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from serve_app.ray_serve.autoscaling import (
    DONE_S,
    OPEN_REQUESTS,
    REMAINING_S,
    REQUEST_S,
    BacklogPolicy,
    ReportedDemand,
)
from serve_app.ray_serve.private_api import (
    DeploymentID,
    ReplicaID,
    TimeStampedValue,
    apply_autoscaling_config,
    queue_length_policy,
)

PLOT = Path(__file__).parent / "plots" / "autoscaling.svg"
DAY_S = 86_400.0
TICK_S = 5.0  # between two decisions; Serve takes ten a second
REPORT_S = 10.0  # Serve's default metrics_interval_s
LOOK_BACK_S = 30.0  # Serve's default look_back_period_s
MOST = 64  # replicas
COLD_STARTS_S = (5.0, 30.0, 150.0)
SEEDS = (11, 12, 13, 14, 15)

# traffic; see the docstring
PER_MINUTE = 20.0  # requests, on average of a day
SESSION_PER_MINUTE = 1.4  # requests of one session
SESSION_S = 7_200.0  # its mean length
QUIET_S = 6_000.0  # once a day no request arrives for this long
USERS, ZIPF = 1_000, 0.87  # sessions per user by rank
IMAGES = {1: 0.58, 2: 0.08, 4: 0.19, 8: 0.15}
STEPS = {20: 0.3, 28: 0.5, 50: 0.2}
STEP_S = 4.3 / 28  # FLUX.1-dev at 1024x1024 on one H100, published

TARGETS = {
    "CV of gaps": 12.0,
    "IoD 1 min": 3.8,
    "IoD 10 min": 27.0,
    "IoD 60 min": 140.0,
    "top 1% users": 0.28,
}


@dataclass(slots=True)
class Request:
    at: float  # seconds
    work_s: float
    user: int
    ended: float = math.inf

    @property
    def kept(self) -> bool:
        return self.ended - self.at <= max(60.0, 3 * self.work_s)


def traffic(seed: int, length_s: float = DAY_S, per_minute: float = PER_MINUTE) -> list[Request]:
    """Requests by time."""
    dice = random.Random(seed)
    weights = [rank**-ZIPF for rank in range(1, USERS + 1)]
    busy = length_s - QUIET_S * max(1, round(length_s / DAY_S))
    rate = per_minute / 60 * length_s / busy  # outside of the quiet stretch
    sessions_per_s = rate / (SESSION_PER_MINUTE / 60) / SESSION_S
    quiet = [day * DAY_S + dice.uniform(0.2, 0.8) * DAY_S for day in range(max(1, round(length_s / DAY_S)))]
    requests: list[Request] = []
    now = -5 * SESSION_S  # so that the day begins with sessions under way
    while (now := now + dice.expovariate(sessions_per_s)) < length_s:
        user = dice.choices(range(USERS), weights)[0]
        end, at = now + dice.expovariate(1 / SESSION_S), now
        while (at := at + dice.expovariate(SESSION_PER_MINUTE / 60)) < min(end, length_s):
            images = dice.choices(list(IMAGES), list(IMAGES.values()))[0]
            steps = dice.choices(list(STEPS), list(STEPS.values()))[0]
            if at >= 0 and not any(start <= at < start + QUIET_S for start in quiet):
                requests.append(Request(at, images * steps * STEP_S, user))
    return sorted(requests, key=lambda request: request.at)


def shape(requests: Sequence[Request], length_s: float) -> dict[str, float]:
    """The figures of TARGETS for these arrivals."""
    times = np.array([request.at for request in requests])
    gaps = np.diff(times)
    found = {"CV of gaps": float(gaps.std() / gaps.mean())}
    for minutes in (1, 10, 60):
        counts = np.histogram(times, np.arange(0, length_s + 1, 60 * minutes))[0]
        found[f"IoD {minutes} min"] = float(counts.var() / counts.mean())
    by_user = sorted(np.bincount([request.user for request in requests], minlength=USERS), reverse=True)
    found["top 1% users"] = float(sum(by_user[: USERS // 100]) / len(requests))
    return found


Policy = Callable[[AutoscalingContext], tuple[int, dict[str, Any]]]


@dataclass(slots=True, eq=False)
class Replica:
    id: ReplicaID
    asked_at: float
    ready_at: float
    free_at: float
    done_s: float = 0.0
    began: float = 0.0  # the work at hand
    request: Request | None = None

    def report(self, now: float) -> dict[str, float]:
        if self.request is None or self.free_at <= now:
            return {DONE_S: self.done_s, REMAINING_S: 0.0, OPEN_REQUESTS: 0.0}
        left_s = self.free_at - now
        return {DONE_S: self.done_s - left_s, REMAINING_S: left_s, OPEN_REQUESTS: 1.0}


@dataclass
class Outcome:
    requests: list[Request]
    gpu_s: float
    curve: list[tuple[float, int, float]] = field(default_factory=list)  # time, replicas, busy ones

    @property
    def slo(self) -> float:
        return sum(request.kept for request in self.requests) / len(self.requests)

    @property
    def versus_ideal(self) -> float:
        return self.gpu_s / sum(request.work_s for request in self.requests)

    def wait_s(self, q: float) -> float:
        waits = sorted(request.ended - request.at - request.work_s for request in self.requests)
        return waits[math.ceil(q * len(waits)) - 1]


class Cluster:
    """One deployment under one policy, second by second."""

    def __init__(
        self,
        requests: Sequence[Request],
        config: AutoscalingConfig,
        policy: Policy,
        cold_start_s: float,
        *,
        store: bool,
    ) -> None:
        """store: requests wait in Weft's store, whose dispatchers report them; else at Serve's handle."""
        self.now = 0.0
        self._requests = [Request(request.at, request.work_s, request.user) for request in requests]
        self._config = config
        self._policy = policy
        self._cold_start_s = cold_start_s
        self._store = store
        self._state: dict[str, Any] = {}
        self._deployment = DeploymentID(name="Model", app_name="sim")
        self._numbers = itertools.count()
        self._replicas: list[Replica] = []
        self._queue: deque[Request] = deque()
        self._target = config.initial_replicas or config.min_replicas
        self._metrics: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
        self._open: deque[tuple[float, float]] = deque()  # number of requests at handles, by time
        self._pushed = 0.0
        self._gpu_s = 0.0
        self._recent: deque[float] = deque(maxlen=32)

    def demand(self) -> ReportedDemand:
        return ReportedDemand(len(self._queue), self._busy(), self.now)

    def run(self) -> Outcome:
        """Simulate until the last request has ended."""
        coming = deque(self._requests)
        curve = []
        self._scale()
        while coming or self._queue or self._busy():
            self._report()
            context = self._context()
            self._target, self._state = self._policy(context)
            self._target = max(self._config.min_replicas, min(self._config.max_replicas, self._target))
            self._scale()
            self._serve(coming)
            self.now += TICK_S
            if round(self.now) % 300 == 0:
                curve.append((self.now, len(self._replicas), self._busy()))
        self._gpu_s += sum(self.now - replica.asked_at for replica in self._replicas)
        return Outcome(self._requests, self._gpu_s, curve)

    def _ready(self) -> list[Replica]:
        return [replica for replica in self._replicas if replica.ready_at <= self.now]

    def _busy(self) -> int:
        return sum(replica.free_at > self.now >= replica.ready_at for replica in self._replicas)

    def _serve(self, coming: deque[Request]) -> None:
        """First come, first served, until the end of this tick."""
        end = self.now + TICK_S
        while coming and coming[0].at < end:
            self._queue.append(coming.popleft())
        free = [(max(r.free_at, r.ready_at), i) for i, r in enumerate(self._replicas) if r.ready_at < end]
        heapq.heapify(free)
        while self._queue and free and free[0][0] < end:
            request = self._queue.popleft()
            at, i = free[0]
            replica = self._replicas[i]
            replica.began = max(at, request.at)
            replica.request = request
            request.ended = replica.free_at = replica.began + request.work_s
            replica.done_s += request.work_s
            self._recent.append(request.work_s)
            heapq.heapreplace(free, (replica.free_at, i))

    def _scale(self) -> None:
        while len(self._replicas) < self._target:
            number = f"r{next(self._numbers)}"
            ready_at = self.now + self._cold_start_s
            self._replicas.append(Replica(ReplicaID(number, self._deployment), self.now, ready_at, ready_at))
        while len(self._replicas) > self._target:
            # Serve stops starting replicas first; a replica with work finishes it
            gone = max(
                self._replicas, key=lambda r: (r.ready_at > self.now, r.free_at <= self.now, r.asked_at)
            )
            self._replicas.remove(gone)
            until = self.now if gone.ready_at > self.now else max(self.now, gone.free_at)
            self._gpu_s += until - gone.asked_at

    def _report(self) -> None:
        """Update what handles and replicas have pushed to the controller, at Serve's intervals."""
        busy = self._busy()
        self._open.append((self.now, float(busy + len(self._queue))))
        if self.now - self._pushed < REPORT_S and self.now > 0:
            return
        self._pushed = self.now
        while self._open[0][0] < self.now - LOOK_BACK_S:
            self._open.popleft()
        self._mean_open = statistics.fmean(count for _, count in self._open)
        self._metrics = {name: {} for name in (DONE_S, REMAINING_S, OPEN_REQUESTS, REQUEST_S)}
        mean_s = statistics.fmean(self._recent) if self._recent else 0.0
        for replica in self._ready():
            for name, value in (replica.report(self.now) | {REQUEST_S: mean_s}).items():
                self._metrics[name][replica.id] = [TimeStampedValue(self.now, value)]

    def _context(self) -> AutoscalingContext:
        ready = self._ready()
        if self._store:  # jobs that dispatchers hold back while nothing runs are unknown to Serve
            total = 0.0 if not ready else self._mean_open
            queued = 0.0
        else:
            # a handle without replicas reports its first request at once
            total = self._open[-1][1] if not ready else self._mean_open
            queued = float(len(self._queue))
        alive = {replica.id for replica in ready}
        return AutoscalingContext(
            deployment_id=self._deployment,
            deployment_name="Model",
            app_name="sim",
            current_num_replicas=len(ready),
            target_num_replicas=self._target,
            running_replicas=[replica.id for replica in ready],
            total_num_requests=total,
            total_queued_requests=queued,
            aggregated_metrics=None,
            raw_metrics={
                name: {replica: points for replica, points in series.items() if replica in alive}
                for name, series in self._metrics.items()
            },
            capacity_adjusted_min_replicas=self._config.min_replicas,
            capacity_adjusted_max_replicas=self._config.max_replicas,
            policy_state=dict(self._state),
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=self.now,
            config=self._config,
        )


def weft(requests: Sequence[Request], cold_start_s: float, **params: float) -> Outcome:
    """BacklogPolicy as serve_app/app.py deploys it."""
    config = AutoscalingConfig(
        min_replicas=0,
        max_replicas=MOST,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        downscale_to_zero_delay_s=0.0,
    )
    policy = BacklogPolicy(**params)
    cluster = Cluster(requests, config, apply_autoscaling_config(policy), cold_start_s, store=True)
    policy.read_demand = lambda *_: cluster.demand()
    return _run(cluster)


def rays_default(requests: Sequence[Request], cold_start_s: float) -> Outcome:
    """Ray's policy function with its default values."""
    config = AutoscalingConfig(min_replicas=0, max_replicas=MOST)
    policy = apply_autoscaling_config(queue_length_policy)
    return _run(Cluster(requests, config, policy, cold_start_s, store=False))


def rays_tuned(requests: Sequence[Request], cold_start_s: float) -> Outcome:
    """Ray's policy function with 0.7 requests per replica and no delay before it scales up."""
    config = AutoscalingConfig(
        min_replicas=0, max_replicas=MOST, target_ongoing_requests=0.7, upscale_delay_s=0.0
    )
    policy = apply_autoscaling_config(queue_length_policy)
    return _run(Cluster(requests, config, policy, cold_start_s, store=False))


def _run(cluster: Cluster) -> Outcome:
    """Run with Ray's delays measured on the cluster's clock."""
    real = rays.time
    rays.time = types.SimpleNamespace(time=lambda: cluster.now, monotonic=lambda: cluster.now)
    try:
        return cluster.run()
    finally:
        rays.time = real


POLICIES: dict[str, Callable[[Sequence[Request], float], Outcome]] = {
    "Ray's default": rays_default,
    "Ray's, target 0.7, no delay": rays_tuned,
    "Weft": weft,
}


@dataclass(frozen=True, slots=True)
class Figures:
    """Results of one policy on one day."""

    slo: float
    versus_ideal: float
    wait_p50_s: float
    wait_p99_s: float
    curve: list[tuple[float, int, float]]


def day(policy: str, cold_start_s: float, seed: int, per_minute: float) -> Figures:
    outcome = POLICIES[policy](traffic(seed, per_minute=per_minute), cold_start_s)
    return Figures(
        outcome.slo, outcome.versus_ideal, outcome.wait_s(0.5), outcome.wait_s(0.99), outcome.curve
    )


def plot(curves: dict[str, list[tuple[float, int, float]]]) -> None:
    import matplotlib as mpl
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "weft"
    _, axes = pyplot.subplots(len(curves), 1, figsize=(9, 6), sharex=True, sharey=True)
    for axis, (name, curve) in zip(axes, curves.items(), strict=True):
        hours = [at / 3600 for at, _, _ in curve]
        axis.step(hours, [replicas for _, replicas, _ in curve], label="replicas", color="tab:blue", lw=0.8)
        axis.fill_between(
            hours, [busy for _, _, busy in curve], step="pre", label="at work", color="tab:orange", alpha=0.6
        )
        axis.set_title(name, loc="left", fontsize=9)
    axes[0].legend(loc="upper left", fontsize=8)
    axes[-1].set_xlabel("hour of a simulated day (cold start 150 s)")
    pyplot.tight_layout()
    pyplot.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="one seed, 150 s only; nothing is recorded")
    parser.add_argument("--per-minute", type=float, default=PER_MINUTE, help="requests, on average of a day")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    seeds, cold_starts = (SEEDS[:1], COLD_STARTS_S[-1:]) if options.dry else (SEEDS, COLD_STARTS_S)
    length_s = (1 if options.dry else 10) * DAY_S
    arrivals = traffic(1, length_s, options.per_minute)
    found = shape(arrivals, length_s)
    for name, target in TARGETS.items():
        print(f"{name:14} {found[name]:7.2f}  published {target:g}")
    load = sum(request.work_s for request in arrivals) / length_s
    print(
        f"{len(arrivals) / length_s * 60:.1f} requests a minute, {load:.2f} GPUs busy on average", flush=True
    )
    cases = [(name, cold, seed) for cold in cold_starts for name in POLICIES for seed in seeds]
    with ProcessPoolExecutor(options.processes) as pool:
        days = [pool.submit(day, *case, options.per_minute) for case in cases]
        results = {case: future.result() for case, future in zip(cases, days, strict=True)}
    print("cold start | policy | SLO (least) | GPU-hours / ideal (most) | wait p50, p99")
    for cold in cold_starts:
        for name in POLICIES:
            of = [results[name, cold, seed] for seed in seeds]
            slo, cost = [one.slo for one in of], [one.versus_ideal for one in of]
            p50, p99 = (statistics.fmean(w) for w in ([d.wait_p50_s for d in of], [d.wait_p99_s for d in of]))
            print(
                f"{cold:>6g} s | {name} | {statistics.fmean(slo):.4f} ({min(slo):.4f})"
                f" | {statistics.fmean(cost):.2f} ({max(cost):.2f}) | {p50:.1f} s, {p99:.0f} s",
                flush=True,
            )
            if options.dry or options.per_minute != PER_MINUTE:
                continue
            suffix = {"Weft": "", "Ray's default": "_ray_default"}.get(name, "_ray_tuned")
            suffix += "" if cold == COLD_STARTS_S[-1] else f"_{cold:g}s"
            note = f"{name}; virtual clock, {cold:g} s cold start, {load:.1f} GPUs busy on average"
            ledger.record(
                f"autoscale_slo{suffix}",
                statistics.fmean(slo),
                "",
                spread=f"{min(slo):.4f} to {max(slo):.4f}",
                n=len(seeds),
                notes=note,
            )
            ledger.record(
                f"autoscale_gpu_hours_vs_ideal{suffix}",
                statistics.fmean(cost),
                "x",
                spread=f"{min(cost):.2f} to {max(cost):.2f}",
                n=len(seeds),
                notes=note,
            )
    if not options.dry and options.per_minute == PER_MINUTE:
        plot({name: results[name, COLD_STARTS_S[-1], SEEDS[0]].curve for name in POLICIES})


if __name__ == "__main__":
    main()
