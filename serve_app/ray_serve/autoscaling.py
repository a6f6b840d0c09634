"""How many replicas a model gets: `Scaler` decides on plain numbers, `BacklogPolicy` feeds it inside Serve.

Serve pickles this module by value and runs the policy in its controller, several times a second: nothing here
may block. What the policy guarantees: docs/scaling.md.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ray import cloudpickle
from ray.serve.config import AutoscalingContext

from serve_app.ray_serve import private_api
from serve_app.ray_serve.private_api import get_value, put_value

# the controller may run without our package: what this module uses of it must travel by value as well
cloudpickle.register_pickle_by_value(private_api)  # type: ignore[no-untyped-call]

NAMESPACE = b"weft"  # in Ray's key-value store
DEMAND_TTL_S = 30.0  # an older report of the dispatchers is ignored
READ_EVERY_S = 1.0
READ_TIMEOUT_S = 2.0
OVERDUE_S = 5.0  # a replica that should have started long ago is expected this much later
SAMPLE_EVERY_S = 1.0

# what every replica reports through ModelReplica.record_autoscaling_stats
DONE_S = "weft_work_done_s"  # since the replica started
REMAINING_S = "weft_work_left_s"  # of the requests on the replica
OPEN_REQUESTS = "weft_requests_open"
REQUEST_S = "weft_request_work_s"  # mean work of the latest requests; 0 before the first


@dataclass(frozen=True, slots=True)
class AutoscalingParams:
    """Values of `serving.autoscaling` in a card. Work is measured in seconds of one replica."""

    utilization: float = 0.75  # target busy share of the replicas, at the long-term rate of arriving work
    rate_window_s: float = 600.0  # window of the long-term rate
    near_window_s: float = 240.0  # window of the rate that is expected until new replicas run
    drain_s: float = 60.0  # time in which new replicas must clear the backlog that the others cannot
    wait_s: float = 20.0  # work per replica that may be left after drain_s without asking for more replicas
    hold_s: float = 180.0  # scale down only after the smaller number was enough for this long
    idle_s: float = 600.0  # scale to zero only after this long without work
    cold_start_s: float = 60.0  # estimate of a replica's start, until one has been measured
    request_s: float = 5.0  # estimate of a request's work, until one has been measured

    def __post_init__(self) -> None:
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization is {self.utilization}; it must be above 0 and at most 1")
        for name in ("rate_window_s", "near_window_s", "drain_s", "cold_start_s", "request_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("wait_s", "hold_s", "idle_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")


@dataclass(frozen=True, slots=True)
class Observation:
    """A deployment at one moment. Work is measured in seconds of one replica."""

    now: float  # seconds
    running: int  # replicas that accept requests
    target: int  # replicas that Serve was asked for; those above `running` are starting
    done_s: float  # work done since the first observation
    backlog_s: float  # work that waits or runs, in the store, at Serve and on the replicas


class Scaler:
    """Computes the number of replicas from the rate of arriving work and from the backlog.

    Arrivals are not counted: the work that arrived is the work that was done plus the growth of the backlog.
    """

    def __init__(self, params: AutoscalingParams) -> None:
        self.cold_start_s = params.cold_start_s  # running mean of measured starts
        self._params = params
        self._arrived: deque[tuple[float, float]] = deque()  # time, work that arrived until then
        self._wanted: deque[tuple[float, int]] = deque()  # time, replicas; decreasing numbers
        self._starting: deque[float] = deque()  # request times of replicas that do not run yet
        self._running: int | None = None
        self._busy_at = -math.inf

    def decide(self, observed: Observation, minimum: int, maximum: int) -> int:
        """The replicas to ask for now, from `minimum` to `maximum`."""
        if self._running is None:  # an earlier controller may have chosen this target
            self._busy_at = observed.now
            self._record_wanted(observed.now, observed.target)
        self._track_starts(observed)
        self._record(observed)
        lasting = math.ceil(self.rate(observed.now) / self._params.utilization - 1e-6)
        replicas = max(
            lasting, self._for_backlog(observed, self.rate(observed.now, self._params.near_window_s))
        )
        if observed.backlog_s > 0:
            replicas = max(replicas, 1)
        if observed.backlog_s > 0 or self._has_new_work():
            self._busy_at = observed.now
        self._record_wanted(observed.now, replicas)
        replicas = self._with_hold(observed, replicas)
        if observed.now - self._busy_at < self._params.idle_s:
            replicas = max(replicas, min(1, observed.target))  # the last one stops only after idle_s
        return max(minimum, min(maximum, replicas))

    def rate(self, now: float, window_s: float | None = None) -> float:
        """Work that arrived within the window per second, which is the number of busy replicas it needs.

        A history shorter than the window counts as preceded by no work, so that one request is no rate yet.
        """
        window_s = self._params.rate_window_s if window_s is None else window_s
        if not self._arrived:
            return 0.0
        first = bisect_right(self._arrived, now - window_s, key=lambda sample: sample[0])
        first_at, arrived_before_s = self._arrived[max(0, first - 1)]
        return max(0.0, self._arrived[-1][1] - arrived_before_s) / max(window_s, now - first_at)

    def _record(self, observed: Observation) -> None:
        """Append the work that arrived until now; drop samples older than both windows."""
        if not self._arrived or observed.now - self._arrived[-1][0] >= SAMPLE_EVERY_S:
            self._arrived.append((observed.now, observed.done_s + observed.backlog_s))
        oldest = observed.now - max(self._params.rate_window_s, self._params.near_window_s)
        while len(self._arrived) > 1 and self._arrived[1][0] <= oldest:
            self._arrived.popleft()

    def _has_new_work(self) -> bool:
        """Whether work arrived between the last two samples."""
        return len(self._arrived) > 1 and self._arrived[-1][1] > self._arrived[-2][1] + 1e-9

    def _for_backlog(self, observed: Observation, rate: float) -> int:
        """Replicas that clear backlog and arrivals `drain_s` after a replica asked for now has started.

        Starting replicas count with the work that they will have done by then.
        """
        drain_s, horizon_s = self._params.drain_s, self.cold_start_s + self._params.drain_s
        work_s = observed.backlog_s + rate * horizon_s
        starting = [self._starts_in_s(asked_at, observed.now) for asked_at in self._starting]
        asked = observed.running + len(starting)
        coming_s = sum(max(0.0, horizon_s - starts_in_s) for starts_in_s in starting)
        wait_s = self._params.wait_s
        short_s = work_s - observed.running * horizon_s - coming_s - asked * wait_s
        if short_s > 0:
            return asked + math.ceil(short_s / (drain_s + wait_s))
        return math.ceil(work_s / (horizon_s + wait_s) - 1e-6)

    def _starts_in_s(self, asked_at: float, now: float) -> float:
        return max(OVERDUE_S, asked_at + self.cold_start_s - now)

    def _track_starts(self, observed: Observation) -> None:
        """Update the request times of starting replicas, and the mean start time from those that now run."""
        started = 0 if self._running is None else max(0, observed.running - self._running)
        for _ in range(min(started, len(self._starting))):
            took_s = observed.now - self._starting.popleft()
            self.cold_start_s += (took_s - self.cold_start_s) / 4
        self._running = observed.running
        while len(self._starting) > max(0, observed.target - observed.running):
            self._starting.pop()  # Serve stops the latest first
        while len(self._starting) < observed.target - observed.running:
            self._starting.append(observed.now)

    def _record_wanted(self, now: float, replicas: int) -> None:
        while self._wanted and self._wanted[-1][1] <= replicas:
            self._wanted.pop()
        self._wanted.append((now, replicas))

    def _with_hold(self, observed: Observation, replicas: int) -> int:
        """The number after the hold: up at once, down to the maximum that was wanted within `hold_s`."""
        while len(self._wanted) > 1 and self._wanted[0][0] <= observed.now - self._params.hold_s:
            self._wanted.popleft()
        if replicas > observed.target:
            return replicas
        return max(replicas, min(observed.target, self._wanted[0][1]))


@dataclass(frozen=True, slots=True)
class ReportedDemand:
    """Jobs for one deployment, as the dispatchers count them."""

    waiting: int  # in the store
    running: int  # sent to Serve
    at: float  # unix seconds, by the clock of the dispatcher's machine


def demand_key(app_name: str, deployment: str) -> bytes:
    return f"demand:{app_name}#{deployment}".encode()


def publish_demand(app_name: str, deployment: str, waiting: int, running: int) -> None:
    """Report the demand for one deployment to its policy. Blocks for one call to Ray's head node."""
    entry = json.dumps({"waiting": waiting, "running": running, "at": time.time()})
    put_value(demand_key(app_name, deployment), entry.encode(), NAMESPACE)


def read_demand(app_name: str, deployment: str) -> ReportedDemand | None:
    """The latest report of the dispatchers, None without one. Blocks for one call to Ray's head node."""
    entry = get_value(demand_key(app_name, deployment), NAMESPACE, READ_TIMEOUT_S)
    return None if entry is None else ReportedDemand(**json.loads(entry))


class DemandReader:
    """The latest report of the dispatchers, read by a thread and returned without waiting."""

    def __init__(self, read: Callable[[str, str], ReportedDemand | None] = read_demand) -> None:
        self._read = read
        self._latest_demand: ReportedDemand | None = None
        self._read_at = -math.inf
        self._reading: asyncio.Future[ReportedDemand | None] | None = None

    def __call__(self, app_name: str, deployment: str, now: float) -> ReportedDemand | None:
        """The last report that was read, None when it is older than DEMAND_TTL_S."""
        if self._reading is not None and self._reading.done():
            if not self._reading.cancelled() and self._reading.exception() is None:
                self._latest_demand = self._reading.result()
            self._reading = None
        if self._reading is None and now - self._read_at >= READ_EVERY_S:
            self._read_at = now
            self._reading = asyncio.get_running_loop().run_in_executor(None, self._read, app_name, deployment)
        latest = self._latest_demand
        return latest if latest is not None and now - latest.at < DEMAND_TTL_S else None


class BacklogPolicy:
    """A Scaler fed with what Serve's controller knows; Serve calls it several times a second.

    The backlog is the work that replicas report, plus the mean work of a request for each request that has
    not reached a replica: those in the store as the dispatchers report them, others as Serve's handles do.
    """

    def __init__(self, **params: float) -> None:
        """Raises TypeError for a name that AutoscalingParams lacks, ValueError for a value out of range."""
        self.read_demand: Callable[[str, str, float], ReportedDemand | None] = DemandReader()
        self._params = AutoscalingParams(**params)
        self._scaler = Scaler(self._params)
        self._request_s = self._params.request_s
        self._done: dict[str, float] | None = None  # by replica, as last reported
        self._done_s = 0.0

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        observed = self._observe(ctx)
        minimum, maximum = ctx.capacity_adjusted_min_replicas, ctx.capacity_adjusted_max_replicas
        return self._scaler.decide(observed, minimum, maximum), {}

    def _observe(self, ctx: AutoscalingContext) -> Observation:
        now = time.time() if ctx.current_time is None else ctx.current_time
        metrics = ctx.raw_metrics or {}
        done, left, held, means = (
            _latest(metrics, name) for name in (DONE_S, REMAINING_S, OPEN_REQUESTS, REQUEST_S)
        )
        if self._done is not None:
            self._done_s += sum(max(0.0, did - self._done.get(replica, 0.0)) for replica, did in done.items())
        self._done = done
        if known := [mean_s for mean_s in means.values() if mean_s > 0]:
            self._request_s = sum(known) / len(known)
        demand = self.read_demand(ctx.app_name or "", ctx.deployment_name, now)
        waiting, sent = (0, 0) if demand is None else (demand.waiting, demand.running)
        # sent to Serve and in no replica's report: still at a handle, or in transit
        in_transit = max(0.0, sent - sum(held.values()), ctx.total_queued_requests or 0.0)
        backlog_s = sum(left.values()) + (waiting + in_transit) * self._request_s
        return Observation(now, ctx.current_num_replicas, ctx.target_num_replicas, self._done_s, backlog_s)


def autoscaling_policy(params: Mapping[str, float]) -> dict[str, Any]:
    """The value of `autoscaling_config.policy`. Raises ValueError naming a parameter that is wrong."""
    names = [field.name for field in fields(AutoscalingParams)]
    if unknown := sorted(set(params) - set(names)):
        raise ValueError(f"there is no parameter {unknown[0]!r}; there is {', '.join(names)}")
    AutoscalingParams(**params)
    return {"policy_function": f"{__name__}:{BacklogPolicy.__name__}", "policy_kwargs": dict(params)}


def _latest(metrics: Mapping[str, Any], name: str) -> dict[str, float]:
    """By replica, the last value that it reported under this name."""
    series = metrics.get(name, {})
    return {str(replica): points[-1].value for replica, points in series.items() if points}
