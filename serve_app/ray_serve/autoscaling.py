"""How many replicas a model gets: `Scaler` decides, `BacklogPolicy` calls it inside Serve.

Serve runs the policy in its controller, pickled by value with this module: nothing here may block, and
nothing beyond the standard library is imported at the top. What it promises: docs/scaling.md.
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

NAMESPACE = b"weft"  # of Ray's key-value store, in which dispatchers tell what waits
DEMAND_TTL_S = 30.0  # a word of the dispatchers that is older counts no more
READ_EVERY_S = 1.0
READ_TIMEOUT_S = 2.0
OVERDUE_S = 5.0  # a replica that should have started long ago is expected this much later
SAMPLE_EVERY_S = 1.0

# what every replica reports; see ModelReplica.record_autoscaling_stats
DONE_S = "weft_work_done_s"  # ever since it started
REMAINING_S = "weft_work_left_s"  # of the requests that it has
OPEN_REQUESTS = "weft_requests_open"
REQUEST_S = "weft_request_work_s"  # mean of the latest; 0 before the first


@dataclass(frozen=True, slots=True)
class AutoscalingParams:
    """Values of `serving.autoscaling` in a card. Work is in seconds that one replica needs for it."""

    utilization: float = 0.75  # of the replicas that the rate of arriving work asks for
    rate_window_s: float = 600.0  # over which that rate is measured
    near_window_s: float = 240.0  # and over which the one that is expected until new replicas run
    drain_s: float = 60.0  # within which new replicas shall clear what the others cannot
    wait_s: float = 20.0  # of work per replica may be left by then: a wait that is no reason for more
    hold_s: float = 180.0  # fewer replicas only when so long no more were wanted
    idle_s: float = 600.0  # none at all only when so long nothing was there to do
    cold_start_s: float = 60.0  # of a replica, until the first has been seen
    request_s: float = 5.0  # work of a request, until the first has been seen

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
    """A deployment at one moment. Work is in seconds of one replica."""

    now: float  # seconds
    running: int  # replicas that work
    target: int  # replicas that were asked for; those above `running` are starting
    done_s: float  # work done since the scaler began to look
    backlog_s: float  # work that waits or is under way, wherever it is


class Scaler:
    """Replicas for the rate at which work arrives, and for a backlog that those asked for will not clear.

    The rate needs no counting of arrivals: what arrived is what was done plus what the backlog grew by.
    """

    def __init__(self, params: AutoscalingParams) -> None:
        self.cold_start_s = params.cold_start_s  # learned
        self._params = params
        self._arrived: deque[tuple[float, float]] = deque()  # time, work that ever arrived until then
        self._wanted: deque[tuple[float, int]] = deque()  # time, replicas; none is followed by a greater one
        self._starting: deque[float] = deque()  # when those were asked for that do not run yet
        self._running: int | None = None
        self._busy_at = -math.inf

    def decide(self, observed: Observation, minimum: int, maximum: int) -> int:
        """The replicas to ask for now, between `least` and `most`."""
        if self._running is None:  # whoever decided before (another controller) may have had reasons
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
        if observed.backlog_s > 0 or self._work_changed(observed):
            self._busy_at = observed.now
        self._record_wanted(observed.now, replicas)
        replicas = self._with_hold(observed, replicas)
        if observed.now - self._busy_at < self._params.idle_s:
            replicas = max(replicas, min(1, observed.target))  # the last one waits longer than the others
        return max(minimum, min(maximum, replicas))

    def rate(self, now: float, window_s: float | None = None) -> float:
        """Work that arrived lately, per second: how many replicas would be busy all the time.

        As if nothing came before the history began: a first request is not a rate yet.
        """
        window_s = self._params.rate_window_s if window_s is None else window_s
        if not self._arrived:
            return 0.0
        first = bisect_right(self._arrived, now - window_s, key=lambda sample: sample[0])
        first_at, started = self._arrived[max(0, first - 1)]
        return max(0.0, self._arrived[-1][1] - started) / max(window_s, now - first_at)

    def _record(self, observed: Observation) -> None:
        """What ever arrived until now."""
        if not self._arrived or observed.now - self._arrived[-1][0] >= SAMPLE_EVERY_S:
            self._arrived.append((observed.now, observed.done_s + observed.backlog_s))
        oldest = observed.now - max(self._params.rate_window_s, self._params.near_window_s)
        while len(self._arrived) > 1 and self._arrived[1][0] <= oldest:
            self._arrived.popleft()

    def _work_changed(self, observed: Observation) -> bool:
        """Whether work was done or came since the last look."""
        return len(self._arrived) > 1 and self._arrived[-1][1] > self._arrived[-2][1] + 1e-9

    def _for_backlog(self, observed: Observation, rate: float) -> int:
        """Replicas that clear backlog and arrivals `drain_s` after one asked for now has started.

        Those that are starting count as what they will have done by then.
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
        """Keep when each starting replica was asked for; learn how long those took that now run."""
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
        """Up at once; down to the most that was wanted within `hold_s`."""
        while len(self._wanted) > 1 and self._wanted[0][0] <= observed.now - self._params.hold_s:
            self._wanted.popleft()
        return (
            replicas
            if replicas > observed.target
            else max(replicas, min(observed.target, self._wanted[0][1]))
        )


@dataclass(frozen=True, slots=True)
class ReportedDemand:
    """What dispatchers say of one deployment; times are of the machines' clocks."""

    waiting: int  # jobs in the store
    running: int  # jobs that dispatchers have given to Serve
    at: float


def demand_key(app_name: str, deployment: str) -> bytes:
    return f"demand:{app_name}#{deployment}".encode()


def publish_demand(app_name: str, deployment: str, waiting: int, running: int) -> None:
    """Leave word for the policy. Blocks for one call to Ray's head."""
    from ray.experimental.internal_kv import _internal_kv_put

    entry = json.dumps({"waiting": waiting, "running": running, "at": time.time()})
    _internal_kv_put(demand_key(app_name, deployment), entry.encode(), namespace=NAMESPACE)


def read_demand(app_name: str, deployment: str) -> ReportedDemand | None:
    """The latest word of the dispatchers, None without any. Blocks for one call to Ray's head."""
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    gcs = internal_kv_get_gcs_client()  # type: ignore[no-untyped-call]
    entry = gcs.internal_kv_get(demand_key(app_name, deployment), NAMESPACE, timeout=READ_TIMEOUT_S)
    return None if entry is None else ReportedDemand(**json.loads(entry))


class DemandReader:
    """The dispatchers' word of one deployment, asked for in a thread and given without waiting."""

    def __init__(self, ask: Callable[[str, str], ReportedDemand | None] = read_demand) -> None:
        self._read = ask
        self._latest_demand: ReportedDemand | None = None
        self._read_at = -math.inf
        self._reading: asyncio.Future[ReportedDemand | None] | None = None

    def __call__(self, app_name: str, deployment: str, now: float) -> ReportedDemand | None:
        if self._reading is not None and self._reading.done():
            if not self._reading.cancelled() and self._reading.exception() is None:
                self._latest_demand = self._reading.result()
            self._reading = None
        if self._reading is None and now - self._read_at >= READ_EVERY_S:
            self._read_at = now
            self._reading = asyncio.get_running_loop().run_in_executor(None, self._read, app_name, deployment)
        return (
            self._latest_demand
            if self._latest_demand is not None and now - self._latest_demand.at < DEMAND_TTL_S
            else None
        )


class BacklogPolicy:
    """A Scaler fed with what Serve's controller knows; Serve calls it several times a second.

    A backlog is what the replicas report in seconds of work, and the requests that have not reached one,
    at the mean of the latest: those in the store by the dispatchers' word, others as handles tell.
    """

    def __init__(self, **params: float) -> None:
        """knobs: see Knobs. Raises TypeError for one that does not exist, ValueError for a bad value."""
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
        waiting, given = (0, 0) if demand is None else (demand.waiting, demand.running)
        # given to Serve and not in any replica's report: still at a handle, or on the way
        on_the_way = max(0.0, given - sum(held.values()), ctx.total_queued_requests or 0.0)
        backlog_s = sum(left.values()) + (waiting + on_the_way) * self._request_s
        return Observation(now, ctx.current_num_replicas, ctx.target_num_replicas, self._done_s, backlog_s)


def autoscaling_policy(params: Mapping[str, float]) -> dict[str, Any]:
    """What `autoscaling_config.policy` shall be. Raises ValueError naming a knob that is wrong."""
    names = [field.name for field in fields(AutoscalingParams)]
    if unknown := sorted(set(params) - set(names)):
        raise ValueError(f"there is no knob {unknown[0]!r}; there is {', '.join(names)}")
    AutoscalingParams(**params)
    return {"policy_function": f"{__name__}:{BacklogPolicy.__name__}", "policy_kwargs": dict(params)}


def _latest(metrics: Mapping[str, Any], name: str) -> dict[str, float]:
    """The last value that each replica reported under this name."""
    series = metrics.get(name, {})
    return {str(replica): points[-1].value for replica, points in series.items() if points}
